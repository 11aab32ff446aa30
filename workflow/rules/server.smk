rule serve:
    input:
        kit=f"{settings.kit}/kit.yaml",
        jobs=settings.jobs,
    output:
        # a run that is refused leaves what an earlier one has made
        party=update(f"{run}/party.json"),
    log:
        f"{logs}/serve.log",
    conda:
        "../envs/fedbio.yaml"
    params:
        kit=input_folder,
        run=output_folder,
    shell:
        "fedbio server --kit {params.kit} --jobs {input.jobs:q} -o {params.run} 2>&1 | tee {log}"
