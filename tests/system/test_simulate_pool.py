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

SITES = 12

# What it draws from, and the module beside it, are those of a whole process: in a pool, of this site alone.
SCRIPT = """
import random

import numpy as np
import fedbio.client as flare
from fedbio.client.algorithms import ControlVariates

import memory

flare.init()
number = int(flare.get_site_name().rpartition("-")[2])
random.seed(number)
np.random.seed(number)
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    metrics = {"accuracy": float(model.params["w"].mean()) if model.params else 0.0}
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics=metrics))
        continue
    if flare.is_submit_model():
        flare.send(flare.FLModel(params={"w": np.full((3, 4), number, np.float32)}))
        continue
    memory.seen.append(float(model.params["w"].sum()))
    noise = np.random.normal(size=(3, 4)) + random.random() + 0.001 * sum(memory.seen)
    params = {"w": (0.5 * model.params["w"] + noise).astype(np.float32)}
    if model.meta.get("scaffold"):
        variates = ControlVariates(model, 0.1, flare.system_info()["workspace"])
        params = {**params, **variates.finish(params, 3)}
    flare.send(flare.FLModel(params=params, metrics=metrics))
    # after its answer it is still this script's turn
    memory.seen.append(random.random() + np.random.random())
"""

MEMORY = "seen = []"

START = """
import numpy as np


def initial():
    return {"w": np.ones((3, 4), np.float32)}
"""

CONTROLLER = """
import msgspec
from fedbio.federation import FLModel, ScriptController
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.tensors import manifest, weighted_mean


class Average(ScriptController):
    def run(self):
        sites = self.trainers()
        model = self.send("client/init", expect=ANY_TENSORS).model
        for number in range(self.rounds):
            task = FLModel(params=model.params, current_round=number, total_rounds=self.rounds)
            results = self.broadcast_and_wait(
                "client/train", task, list(sites), expect=manifest(model.params), weights=sites
            )
            mean = weighted_mean([(each.site, each.model.params, each.model.weight) for each in results])
            model = msgspec.structs.replace(model, params=mean)
            self.state.store(self.job, f"model-{number}", mean)
"""

CLIENT = {
    "script": "train.py",
    "files": ["start.py", "memory.py"],
    "initial": "start.py:initial",
    "launch": "in_process",
}

JOBS: list[dict[str, Any]] = [
    {"name": "mean", "workflow": "fedavg", "rounds": 3, "client": CLIENT},
    {"name": "some", "workflow": "fedavg", "rounds": 3, "client": CLIENT, "sites_per_round": 5, "norm_bound": 50},
    {"name": "krum", "workflow": "fedavg", "rounds": 2, "client": CLIENT, "aggregate": "krum", "byzantine": 2},
    {"name": "scaffold", "workflow": "fedavg", "rounds": 2, "client": CLIENT, "scaffold": True},
    {"name": "adam", "workflow": "fedavg", "rounds": 2, "client": CLIENT, "optimizer": {"name": "adam"}},
    {"name": "cyclic", "workflow": "cyclic", "rounds": 2, "client": CLIENT, "order": "random"},
    {"name": "swarm", "workflow": "swarm", "rounds": 2, "client": CLIENT},
    {"name": "evaluation", "workflow": "evaluation", "client": {**CLIENT, "initial": None}},
    {"name": "statistics", "workflow": "statistics", "min_count": 1},
    {"name": "own", "workflow": "custom", "rounds": 2, "controller": "own.py:Average", "client": CLIENT},
]


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
def test_every_workflow_of_scripts_gives_the_same_in_the_pool_as_in_processes(tmp_path: Path) -> None:
    for name, content in {
        "train.py": SCRIPT,
        "start.py": START,
        "memory.py": MEMORY,
        "own.py": CONTROLLER,
        "jobs.yaml": yaml.safe_dump({"jobs": JOBS}),
    }.items():
        (tmp_path / name).write_text(content)
    for number in range(1, SITES + 1):
        proteins = [
            Protein(f"{number}-{each}", "MKV" + "A" * each, "Nucleus", "train", False) for each in range(number)
        ]
        write_fasta(proteins, tmp_path / f"data/site-{number}.fasta")
    found = []
    for processes in (0, 2):
        run = tmp_path / f"run-{processes}"
        simulate(tmp_path / "jobs.yaml", "-o", run, "--data", tmp_path / "data", "--pool", processes)
        found.append(
            {
                str(path.relative_to(run)): sha256_file(path)
                for pattern in ("server/models/*/*", "server/models/*/*/*", "site-*/swarm/swarm/*.safetensors")
                for path in run.glob(pattern)
                if path.suffix in (".safetensors", ".csv")
            }
        )
    alone, pooled = found
    assert alone == pooled
    made = {Path(name).parts[2] for name in alone if name.startswith("server/")}
    assert made == {job["name"] for job in JOBS} - {"swarm"}
    # best and last at each site, and all the same
    assert len([name for name in alone if "/swarm/" in name]) == 2 * SITES
    assert len({digest for name, digest in alone.items() if name.endswith("swarm/swarm/last.safetensors")}) == 1


SPLIT = """
import numpy as np
import torch
from torch import nn


def bottom():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.2))


def top():
    return nn.Linear(3, 2)


def features(here):
    return [str(number) for number in range(40)], torch.from_numpy(
        np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    )


def labels(here):
    return [str(number) for number in range(5, 45)], torch.arange(40) % 2


def optimizer(module):
    return torch.optim.Adam(module.parameters())
"""


@pytest.mark.slow
def test_sites_of_a_split_network_have_processes_of_their_own_beside_the_pool(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SPLIT)
    # by their names one process would play both
    cut = {"bottom": "site-1", "top": "site-3", "epochs": 2, "batch_size": 16, "client": {"script": "net.py"}}
    jobs = [{"workflow": "split", **cut}, {"workflow": "statistics", "min_count": 1}]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    for number in range(1, 4):
        write_fasta([Protein("a", "MKVA", "Nucleus", "train", False)], tmp_path / f"data/site-{number}.fasta")
    found = set()
    for processes in (0, 1):
        run = tmp_path / f"run-{processes}"
        simulate(tmp_path / "jobs.yaml", "-o", run, "--data", tmp_path / "data", "--pool", processes)
        parts = [run / "site-1/split/split/bottom.safetensors", run / "site-3/split/split/top.safetensors"]
        found.add(tuple(sha256_file(part) for part in parts))
    assert len(found) == 1
    assert sorted(path.name for path in (run / "pool").iterdir()) == [f"process-{number}.txt" for number in (1, 2, 3)]
