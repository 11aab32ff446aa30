"""Rules pass Snakemake's own checks; the profiles name options that it has and resources that it understands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.cli import get_argument_parser
from snakemake.profiles import ProfileConfigFileParser

ROOT = Path(__file__).parents[2]

PLUGINS = {
    # options of executor and storage plugins, which need not be installed here: as version 0.5 and 0.3 document them
    "kubernetes": {"kubernetes-namespace"},
    "slurm": set[str](),
    "default": set[str](),
}


def read(name: str) -> dict[str, Any]:
    with open(ROOT / "profiles" / name / "config.yaml") as file:
        return dict(ProfileConfigFileParser().parse(file))


@pytest.mark.parametrize("name", PLUGINS)
def test_profile_names_options_of_snakemake(name: str) -> None:
    known = {option.removeprefix("--") for action in get_argument_parser()._actions for option in action.option_strings}
    assert set(read(name)) - known <= PLUGINS[name]


def test_resources_of_the_profiles_reach_the_jobs(tmp_path: Path) -> None:
    """A dry run of this machine takes the profiles' resources, as the plugins would."""
    profile = {key: value for key, value in read("kubernetes").items() if key in ("default-resources", "set-resources")}
    (tmp_path / "p.fasta").write_text(">a\nMKV\n>b\nMKV\n")
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text(yaml.safe_dump(profile))
    command = [str(Path(sys.executable).parent / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--dry-run"]
    command += ["--workflow-profile", str(tmp_path / "profile"), "--configfile", str(ROOT / "config/embeddings.yaml")]
    command += ["--config", "proteins=p.fasta", "shards=2", "--directory", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    shown = output.stdout + output.stderr
    resources = [line for line in shown.splitlines() if "resources:" in line]
    wanted = ("mem_mb=16000", "disk_mb=20000", "runtime=240", "gpu=1", "gpu_manufacturer=nvidia", "scale=0")
    assert sum(all(f"{each}," in f"{line}," for each in wanted) for line in resources) == 2, shown


@pytest.mark.parametrize("settings", ["config", "site", "server", "embeddings", "encoder"])
def test_rules_of_each_party_pass_snakemakes_lint(settings: str) -> None:
    command = [str(Path(sys.executable).parent / "snakemake"), "--lint", "--configfile", f"config/{settings}.yaml"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert output.returncode == 0, output.stdout + output.stderr
    assert "in a good condition" in output.stdout + output.stderr
