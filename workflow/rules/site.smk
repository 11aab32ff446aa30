rule join:
    input:
        proteins=settings.proteins,
        labels=settings.labels or [],
        kit=f"{settings.kit}/kit.yaml",
    output:
        # a run that is refused leaves what an earlier one has made
        party=update(f"{run}/party.json"),
        model=update(f"{run}/global/model.safetensors"),
        card=update(f"{run}/global/model.json"),
    log:
        f"{logs}/join.log",
    conda:
        "../envs/fedbio.yaml"
    threads: workflow.cores
    params:
        settings=settings_arguments(),
        run=output_folder,
    shell:
        "fedbio site --settings {params.settings:q} --threads {threads} -o {params.run} 2>&1 | tee {log}"
