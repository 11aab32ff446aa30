trained = f"{run}/{settings.preset}"
benchmarks = Path(workflow.basedir) / "benchmarks"

# name of the features: the encoder, and how it is asked
features = {
    "mean": (f"{trained}/model.safetensors", "--pooling mean"),
    "ends": (f"{trained}/model.safetensors", "--pooling ends"),
    "cut": (f"{trained}/model.safetensors", "--pooling ends --long cut"),
    "exact": (f"{run}/pretrained", "--pooling ends"),
    "untrained": (f"{run}/untrained/model.safetensors", "--pooling ends"),
}


wildcard_constraints:
    features="|".join(features),


rule pretrain:
    input:
        corpus=settings.corpus,
        valid=settings.valid or [],
        table=settings.table,
    output:
        # not its folder, which a call that goes on must find
        touch(f"{run}/pretrained"),
    log:
        f"{logs}/pretrain.log",
    conda:
        "../envs/fedbio.yaml"
    threads: settings.threads
    resources:
        gpu=int(settings.device != "cpu"),
        mem_mb=32_000,
        runtime=2_880,
    params:
        folder=f"{run}/training",
        preset=settings.preset,
        tokens=f"{settings.tokens:g}",
        device=settings.device,
        valid=given("--valid", "valid"),
        more=settings.pretrain,
        # a stretch that ends in time (--minutes) is no end of the training
        finished="import json, sys; sys.exit(0 if json.load(sys.stdin)['finished'] else 'say the same command again')",
    shell:
        "fedbio pretrain {input.corpus:q} {params.valid:q} --exclude {input.table:q} -o {params.folder}"
        " --preset {params.preset} --tokens {params.tokens} --device {params.device} --threads {threads}"
        " {params.more:q} 2>&1 | tee {log}; python -c {params.finished:q} < {params.folder}/training.json"


rule convert:
    input:
        f"{run}/pretrained",
    output:
        f"{trained}/model.safetensors",
    log:
        f"{logs}/convert.log",
    conda:
        "../envs/fedbio.yaml"
    params:
        training=f"{run}/training",
        folder=output_folder,
        weights=settings.weights,
    shell:
        "fedbio encoder convert {params.training} -o {params.folder} --weights {params.weights} 2>&1 | tee {log}"


rule untrained:
    input:
        f"{trained}/model.safetensors",
    output:
        f"{run}/untrained/model.safetensors",
    log:
        f"{logs}/untrained.log",
    conda:
        "../envs/fedbio.yaml"
    params:
        script=benchmarks / "untrained.py",
        like=input_folder,
        folder=output_folder,
    shell:
        "python {params.script:q} {params.like} -o {params.folder} 2>&1 | tee {log}"


rule features:
    input:
        table=settings.table,
        encoder=lambda wildcards: features[wildcards.features][0],
    output:
        f"{run}/{{features}}.h5",
    log:
        f"{logs}/{{features}}.log",
    conda:
        "../envs/fedbio.yaml"
    threads: settings.threads
    resources:
        gpu=int(settings.device != "cpu"),
        mem_mb=16_000,
        runtime=240,
    params:
        encoder=encoder_of,
        how=lambda wildcards: features[wildcards.features][1],
        device=settings.device,
    shell:
        "fedbio embed {input.table:q} -o {output} --encoder {params.encoder} {params.how}"
        " --device {params.device} --threads {threads} 2>&1 | tee {log}"


rule choose_features:
    input:
        table=settings.table,
        embeddings=[f"{run}/{name}.h5" for name in ("mean", "ends", "cut", "exact")],
    output:
        f"{run}/choice.json",
    log:
        f"{logs}/choose_features.log",
    conda:
        "../envs/fedbio.yaml"
    threads: settings.threads
    params:
        script=benchmarks / "scl_probe.py",
        embeddings=embeddings_of("mean", "ends", "cut", "exact"),
        more=settings.probe,
    shell:
        "python {params.script:q} {input.table:q} --validation-only {params.embeddings}"
        " {params.more:q} 2> >(tee {log} >&2) | tail -n 1 > {output}"


rule probe:
    input:
        table=settings.table,
        meta=settings.meta or [],
        embeddings=[f"{run}/{name}.h5" for name in ("ends", "untrained")],
    output:
        f"{run}/probe.json",
    log:
        f"{logs}/probe.log",
    conda:
        "../envs/fedbio.yaml"
    threads: settings.threads
    params:
        script=benchmarks / "scl_probe.py",
        embeddings=embeddings_of("ends", "untrained"),
        meta=given("--meta", "meta"),
        more=settings.probe,
    shell:
        # it ends with 1 if the encoder is worth nothing, which is a result
        "(python {params.script:q} {input.table:q} {params.embeddings} {params.meta:q} --beside --federated ends"
        " {params.more:q} || [ $? -eq 1 ]) 2> >(tee {log} >&2) | tail -n 1 > {output}"
