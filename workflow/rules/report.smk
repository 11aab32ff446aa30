rule report:
    input:
        parties=parts_of_report,
    output:
        page=f"{run}/report.html",
        summary=f"{run}/summary.json",
    log:
        f"{logs}/report.log",
    conda:
        "../envs/fedbio.yaml"
    params:
        run=output_folder,
    shell:
        "fedbio report {params.run} -o {output.page} 2>&1 | tee {log}"
