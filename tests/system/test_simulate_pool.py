"""`fedbio simulate` on a pool of processes: the same models as with a process for each site."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbio.files import sha256_file
from fedbio.proteins import Protein, write_fasta

FEDBIO = [sys.executable, "-m", "fedbio"]

SCRIPT = """
import numpy as np
import fedbio.client as flare

flare.init()
number = int(flare.get_site_name().rpartition("-")[2])
seen = 0.0
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    # what it keeps between two rounds counts too
    seen += float(model.params["w"].sum())
    params = {name: value + np.float32(number + 0.001 * seen) for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, metrics={"accuracy": float(model.params["w"].mean())}))
"""

START = """
import numpy as np


def initial():
    return {"w": np.ones((3, 4), np.float32)}
"""


def simulate(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [*FEDBIO, "simulate", *map(str, arguments), "--json"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.mark.slow
def test_model_of_twelve_sites_is_the_same_with_a_process_for_each(tmp_path: Path, small_encoder: Path) -> None:
    settings = {
        "dataset": "demo",
        "demo": {"proteins": 360},
        "sites": {"alpha": 50.0, "count": 12},
        "encoder": {"name": str(small_encoder)},
        "training": {"mlps": ["8"], "seeds": [0], "rounds": 3, "patience": 3},
        "report": {"map_points": 10},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    pooled, single = tmp_path / "pooled", tmp_path / "single"
    simulate(config, "-o", pooled)
    simulate(config, "-o", single, "--pool", 0, "--data", pooled / "data")
    assert sha256_file(pooled / "global/model.safetensors") == sha256_file(single / "global/model.safetensors")
    assert not list(single.glob("pool"))
    for name in ("server", *(f"site-{number}" for number in range(1, 13))):
        here, there = (json.loads((run / name / "party.json").read_text()) for run in (pooled, single))
        assert here["best"] == there["best"]
        assert here["sent"]["model"] == there["sent"]["model"]
    # a second time there is nothing left to do
    before = (pooled / "server/events.jsonl").read_bytes()
    simulate(config, "-o", pooled)
    assert (pooled / "server/events.jsonl").read_bytes() == before


@pytest.mark.slow
def test_job_file_of_a_script_runs_in_the_pool_as_in_processes(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "start.py").write_text(START)
    client = {"script": "train.py", "files": ["start.py"], "initial": "start.py:initial", "launch": "in_process"}
    job = {"workflow": "fedavg", "rounds": 3, "client": client}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
    for number in range(1, 4):
        proteins = [
            Protein(f"{number}-{each}", "MKV" + "A" * each, "Nucleus", "train", False) for each in range(number)
        ]
        write_fasta(proteins, tmp_path / f"data/site-{number}.fasta")
    found = set()
    for processes in (0, 2):
        run = tmp_path / f"run-{processes}"
        simulate(tmp_path / "jobs.yaml", "-o", run, "--sites", 3, "--data", tmp_path / "data", "--pool", processes)
        found.add(sha256_file(run / "server/models/fedavg/last.safetensors"))
    assert len(found) == 1


def test_pool_refuses_what_streams_between_sites(tmp_path: Path) -> None:
    write_fasta([Protein("a", "MKVA", "Nucleus", "train", False)], tmp_path / "data/site-1.fasta")
    job = {"workflow": "classify", "aggregation": "lockstep"}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
    arguments = ["-o", tmp_path / "run", "--data", tmp_path / "data", "--pool", "1"]
    refused = subprocess.run(
        [*FEDBIO, "simulate", tmp_path / "jobs.yaml", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "aggregation: lockstep streams between processes" in refused.stderr
    assert "--pool 0" in refused.stderr
