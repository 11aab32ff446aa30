# The one entry for Snakemake users.
#
#   snakemake --cores all                                    a server and three sites on this machine
#   snakemake --cores all --configfile config/site.yaml      one site of a real federation
#   snakemake --cores all --configfile config/server.yaml    the server of a real federation
#   snakemake --cores all --configfile config/embeddings.yaml --config proteins=FILE shards=4
#                                                            a large file of proteins, embedded in shards
#   snakemake --cores all --configfile config/encoder.yaml   an encoder trained, and what it is worth
from snakemake.utils import min_version

min_version("9.0")

if not workflow.configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"


if settings.party == "all":

    include: "workflow/rules/proteins.smk"
    include: "workflow/rules/simulate.smk"
    include: "workflow/rules/report.smk"

elif settings.party == "site":

    include: "workflow/rules/site.smk"
    include: "workflow/rules/report.smk"

elif settings.party == "embeddings":

    include: "workflow/rules/embeddings.smk"

elif settings.party == "encoder":

    include: "workflow/rules/encoder.smk"

else:

    include: "workflow/rules/server.smk"


rule all:
    default_target: True
    input:
        results_of(settings.party),
