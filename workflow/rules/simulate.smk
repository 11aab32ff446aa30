site_folders = [f"{run}/{site}" for site in settings.sites.names]


rule federate:
    input:
        fasta=sites_fasta,
        embeddings=settings.embeddings or [],
    output:
        # a run that is refused leaves what an earlier one has made
        parties=[
            update(f"{folder}/party.json")
            for folder in (f"{run}/server", *site_folders)
        ],
        model=update(f"{run}/global/model.safetensors"),
        card=update(f"{run}/global/model.json"),
    log:
        f"{logs}/federate.log",
    conda:
        "../envs/fedbio.yaml"
    threads: workflow.cores
    params:
        settings=settings_arguments(),
        data=input_folder,
        run=output_run,
    shell:
        "fedbio simulate {params.settings:q} --data {params.data} -o {params.run} 2>&1 | tee {log}"


rule central:
    input:
        fasta=sites_fasta,
        parties=[f"{folder}/party.json" for folder in site_folders],
    output:
        party=f"{run}/central/party.json",
    log:
        f"{logs}/central.log",
    conda:
        "../envs/fedbio.yaml"
    threads: workflow.cores
    params:
        settings=settings_arguments(),
        embeddings=embeddings_beside,
        folder=output_folder,
    shell:
        "fedbio train {input.fasta} --embeddings {params.embeddings} --settings {params.settings:q}"
        " --party central -o {params.folder} 2>&1 | tee {log}"
