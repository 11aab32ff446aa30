import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from fedbio.errors import SettingsError
from fedbio.settings import check_party
from fedbio.settings_files import read_yaml

# the rules call the `fedbio` that is installed beside this Snakemake, activated or not; a prefix replaces Snakemake's
# own, without which a command that fails before `| tee` would pass for done
beside = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(f"set -euo pipefail; export PATH={beside}:$PATH; ")

settings_file = os.path.relpath(workflow.configfiles[0])

try:
    settings = check_party(config, settings_file)
except SettingsError as error:
    raise WorkflowError(str(error))

run_name = settings.run_name if settings.party == "all" else settings.run
run = f"results/{run_name}"
logs = f"logs/{run_name}"


def settings_arguments():
    """The settings file, and what --config puts over it, as arguments of a fedbio command."""
    written = read_yaml(settings_file)
    changed = {key: value for key, value in config.items() if written.get(key) != value}
    return [
        settings_file,
        *(
            part
            for key, value in changed.items()
            for part in ("--set", f"{key}={json.dumps(value)}")
        ),
    ]


def results_of(party):
    """What `snakemake` without a target makes for this party."""
    if party == "embeddings":
        return [f"{run}/embeddings.h5"]
    if party == "encoder":
        return [f"{run}/choice.json", f"{run}/probe.json"]
    return [f"{run}/party.json"] if party == "server" else [f"{run}/report.html"]


def parts_of_report(wildcards):
    """The accounts that the report is made of: one per party on this machine, or this site's own."""
    if settings.party != "all":
        return [f"{run}/party.json"]
    return [
        f"{run}/{party}/party.json"
        for party in ("server", *settings.sites.names, "central")
    ]


def output_folder(wildcards, output):
    """The folder that a rule's command is given to write to."""
    return str(Path(output[0]).parent)


def output_run(wildcards, output):
    """The run's folder, for a command that gives each party a folder in it."""
    return str(Path(output[0]).parent.parent)


def input_folder(wildcards, input):
    """The folder that a rule's first input lies in."""
    return str(Path(input[0]).parent)


def embeddings_beside(wildcards, input):
    """Each site's embeddings, which lie beside its account of the run."""
    return [str(Path(party).with_name("embeddings.h5")) for party in input.parties]


def encoder_arguments(settings):
    """Which encoder, and how it shall compute, as arguments of `fedbio embed`."""
    chosen = settings.encoder.model_dump(exclude={"name"}, exclude_none=True)
    named = {"encoder": settings.encoder.name, "device": settings.device, **chosen}
    return [
        part
        for key, value in named.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]


def given(option, name):
    """An input that may be missing, as arguments of a command."""
    return lambda wildcards, input: [option, input.get(name)] if input.get(name) else []


def more_on_each_attempt(amount):
    """A resource of which a job that failed asks more when it is tried again."""
    return lambda wildcards, attempt: amount * attempt


def embeddings_of(*names):
    """Embeddings files of this run, as arguments of the probe."""
    return lambda wildcards, input: [
        part for name in names for part in ("--embeddings", f"{name}={run}/{name}.h5")
    ]


def encoder_of(wildcards, input):
    """The folder of an encoder: that of its weights, or, where the mark of the end of a training stands for it, its own."""
    marked = input.encoder == f"{run}/pretrained"
    return f"{run}/training" if marked else str(Path(input.encoder).parent)
