shards = [f"{number}-of-{settings.shards}" for number in range(1, settings.shards + 1)]


wildcard_constraints:
    shard=r"\d+-of-\d+",


rule shard_proteins:
    input:
        proteins=settings.proteins,
        labels=settings.labels or [],
    output:
        fasta=temp([f"{run}/shards/{shard}.fasta" for shard in shards]),
    log:
        f"{logs}/shard_proteins.log",
    conda:
        "../envs/fedbio.yaml"
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        folder=output_folder,
        shards=settings.shards,
        classes=",".join(settings.classes),
        labels=given("--labels", "labels"),
    shell:
        "fedbio data shard {input.proteins:q} -o {params.folder} --shards {params.shards}"
        " --classes {params.classes:q} {params.labels:q} 2>&1 | tee {log}"


rule embed_shard:
    input:
        fasta=f"{run}/shards/{{shard}}.fasta",
        reuse=settings.embeddings or [],
    output:
        embeddings=temp(f"{run}/shards/{{shard}}.h5"),
    log:
        f"{logs}/embed_shard/{{shard}}.log",
    conda:
        "../envs/fedbio.yaml"
    threads: settings.threads
    resources:
        gpu=int(settings.device != "cpu"),
        mem_mb=more_on_each_attempt(16_000),
        runtime=more_on_each_attempt(240),
    params:
        encoder=encoder_arguments(settings),
        classes=",".join(settings.classes),
        reuse=given("--reuse", "reuse"),
    shell:
        "fedbio embed {input.fasta} -o {output.embeddings} {params.encoder:q} --classes {params.classes:q}"
        " {params.reuse:q} --threads {threads} --wait --label {wildcards.shard} 2>&1 | tee {log}"


rule embeddings:
    input:
        shards=[f"{run}/shards/{shard}.h5" for shard in shards],
    output:
        embeddings=f"{run}/embeddings.h5",
    log:
        f"{logs}/embeddings.log",
    conda:
        "../envs/fedbio.yaml"
    resources:
        mem_mb=4000,
        runtime=120,
    shell:
        "fedbio embeddings merge {input.shards} -o {output.embeddings} 2>&1 | tee {log}"
