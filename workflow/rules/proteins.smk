from fedbio.errors import DataError
from fedbio.proteins.datasets import is_named

demo = f"{run}/proteins.fasta"
try:
    known = settings.dataset if is_named(settings.dataset) else None
except DataError as error:
    raise WorkflowError(f"{settings_file}: dataset: {error}")
proteins = (
    demo
    if settings.dataset == "demo"
    else f"resources/{known}.csv" if known else settings.dataset
)
sites_fasta = [f"{run}/data/{site}.fasta" for site in settings.sites.names]


rule demo_proteins:
    output:
        fasta=demo,
    log:
        f"{logs}/demo_proteins.log",
    conda:
        "../envs/fedbio.yaml"
    params:
        number=settings.demo.proteins,
        seed=settings.demo.seed,
        difficulty=settings.demo.difficulty,
    shell:
        "fedbio data demo -o {output.fasta} --count {params.number} --seed {params.seed}"
        " --difficulty {params.difficulty} 2>&1 | tee {log}"


rule fetch_proteins:
    output:
        table="resources/{name}.csv",
    log:
        "logs/fetch_proteins/{name}.log",
    conda:
        "../envs/fedbio.yaml"
    shell:
        "fedbio data fetch {wildcards.name} -o {output.table} 2>&1 | tee {log}"


rule split_proteins:
    input:
        proteins=proteins,
        labels=settings.labels or [],
    output:
        fasta=sites_fasta,
    log:
        f"{logs}/split_proteins.log",
    conda:
        "../envs/fedbio.yaml"
    params:
        folder=output_folder,
        names=",".join(settings.sites.names),
        by=settings.sites.by,
        alpha=settings.sites.alpha,
        seed=settings.sites.seed,
        classes=",".join(settings.classes),
        labels=["--labels", settings.labels] if settings.labels else [],
        limit=["--limit", str(settings.max_proteins)] if settings.max_proteins else [],
    shell:
        "fedbio data split {input.proteins:q} -o {params.folder} --names {params.names} --by {params.by:q}"
        " --alpha {params.alpha} --seed {params.seed} --classes {params.classes:q}"
        " {params.labels:q} {params.limit:q} 2>&1 | tee {log}"
