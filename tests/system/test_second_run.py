"""A second run into the folder of a finished one: what is there stays, or the run is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbio.files import sha256_file

FEDBIO = [sys.executable, "-m", "fedbio"]
EXAMPLES = Path(__file__).parents[2] / "examples"
ANOTHER = "delete it or give another output (-o; with Snakemake: --config run=NAME), or take back the change"


def simulate(job: Path, run: Path, sites: int) -> subprocess.CompletedProcess[str]:
    arguments = ["simulate", str(job), "--sites", str(sites), "-o", str(run)]
    return subprocess.run([*FEDBIO, *arguments], capture_output=True, text=True, timeout=200, check=False)


def digests(run: Path) -> dict[str, str]:
    """All that is in a run's folder; a look at the state makes and removes files beside it."""
    return {
        str(path.relative_to(run)): sha256_file(path)
        for path in run.rglob("*")
        if path.is_file() and not path.name.startswith("state.sqlite")
    }


def refused(job: Path, run: Path, sites: int, reason: str) -> None:
    before = digests(run)
    done = simulate(job, run, sites)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"fedbio: {run} holds the results of {reason}; {ANOTHER}"
    assert digests(run) == before


@pytest.mark.slow
def test_results_are_not_taken_for_those_of_another_split(tmp_path: Path, small_encoder: Path) -> None:
    settings, run = tmp_path / "config.yaml", tmp_path / "run"
    said = {
        "dataset": "demo",
        "demo": {"proteins": 200},
        "sites": {"count": 2, "seed": 0},
        "encoder": {"name": str(small_encoder)},
        "training": {"mlps": ["8"], "seeds": [0], "rounds": 1},
        "report": {"map": False},
    }
    settings.write_text(yaml.safe_dump(said))
    command = [*FEDBIO, "simulate", str(settings), "-o", str(run)]

    def again(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=200, check=False)

    first = again()
    assert first.returncode == 0, first.stderr
    before = digests(run)
    other = again("--set", "sites.seed=1")
    assert other.returncode == 2
    assert "holds the results of other proteins (they were dealt out otherwise)" in other.stderr
    assert digests(run) == before
    assert again().returncode == 0
    # a lock names the process that held it last
    assert {**digests(run), "federation/.lock": ""} == {**before, "federation/.lock": ""}


@pytest.mark.slow
def test_results_are_not_taken_for_those_of_another_job_or_other_proteins(tmp_path: Path) -> None:
    job, run = tmp_path / "job/job.yaml", tmp_path / "run"
    shutil.copytree(EXAMPLES / "numpy", job.parent)
    script = job.parent / "train.py"
    mine = script.read_text()
    script.write_text("import nothing_of_this_name\n" + mine)
    assert simulate(job, run, 2).returncode != 0
    # nothing had come of it: a script may be mended
    script.write_text(mine)
    first = simulate(job, run, 2)
    assert first.returncode == 0, first.stderr

    refused(EXAMPLES / "torch/job.yaml", run, 2, "another job (fedavg was begun with another train.py)")
    script.write_text(mine + "\n# edited\n")
    refused(job, run, 2, "another job (fedavg was begun with another train.py)")
    script.write_text(mine)
    settings = job.read_text()
    job.write_text(settings.replace("rounds: 2", "rounds: 3"))
    refused(job, run, 2, "another job (fedavg was begun with other settings)")
    job.write_text(settings)
    refused(job, run, 3, "other sites (site-1, site-2)")
    proteins = run / "data/site-1.fasta"
    whole = proteins.read_text()
    proteins.write_text(whole.replace("TARGET=", "TARGET= ", 1))
    refused(job, run, 2, "other proteins (site-1 has changed)")

    # all as it was, though with another time
    proteins.write_text(whole)
    again = simulate(job, run, 2)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    # and when Snakemake has removed what its rule makes
    parties = {path: path.read_bytes() for path in run.glob("*/party.json")}
    assert len(parties) == 3
    for path in parties:
        path.unlink()
    again = simulate(job, run, 2)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in run.glob("*/party.json")} == parties


@pytest.mark.slow
def test_site_that_comes_again_to_a_finished_server_keeps_its_record(parties: Any) -> None:
    parties.write_jobs(rounds=1)
    found = []
    for _ in range(2):
        running = [parties.server(), *(parties.site(f"site-{number}") for number in (1, 2, 3))]
        for process in running:
            assert process.wait(120) == 0, parties.log("server") + parties.log("site-1")
        found.append({path: path.read_bytes() for path in parties.folder.glob("*/party.json")})
    assert len(found[0]) == 4
    assert found[0] == found[1]
