"""Decorated functions in whole jobs: a loop that evaluates and trains in each turn, whatever is asked."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedbio.proteins import Protein, write_fasta
from fedbio.tensors import open_file, write_file

SCRIPT = """
import numpy as np
import fedbio.client as flare

def initial():
    return {"w": np.zeros(2, np.float32)}

@flare.evaluate
def fl_evaluate(input_model=None):
    return float(input_model.params["w"].mean())

@flare.train
def train(input_model=None, step=0):
    return flare.FLModel(params={"w": input_model.params["w"] + np.float32(step)})

if __name__ == "__main__":
    flare.init()
    while flare.is_running():
        input_model = flare.receive()
        fl_evaluate(input_model)
        train(input_model, step=1)
"""

CLIENT = {"script": "train.py", "launch": "in_process"}

JOBS: list[dict[str, Any]] = [
    {"name": "mean", "workflow": "fedavg", "rounds": 2, "client": {**CLIENT, "initial": "train.py:initial"}},
    {"name": "tried", "workflow": "evaluation", "client": CLIENT, "models": ["one.safetensors"], "sites": False},
]


def test_unguarded_loop_is_right_in_averaging_and_in_evaluation(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": JOBS}))
    write_file(tmp_path / "one.safetensors", {"w": np.full(2, 7, np.float32)})
    sites = ("site-1", "site-2")
    for site in sites:
        write_fasta([Protein(f"{site}-1", "MKV", "Nucleus", "train", False)], tmp_path / f"data/{site}.fasta")
    command = [sys.executable, "-m", "fedbio", "simulate", "jobs.yaml", "-o", "run", "--data", "data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    server = tmp_path / "run/server"
    assert open_file(server / "models/mean/last.safetensors")["w"].tolist() == [2, 2]
    with open(server / "models/tried/evaluation.csv", newline="") as file:
        cells = [(row["site"], row["metric"], float(row["value"])) for row in csv.DictReader(file)]
    assert cells == [(site, "accuracy", 7.0) for site in sites]
    # no task failed, which would have started a script anew: the last model of averaging is evaluated as well
    events = [json.loads(line) for line in (server / "events.jsonl").read_text().splitlines()]
    assert [each["round"] for each in events if each["event"] == "round"] == [0, 1, 2]
    assert not [each for each in events if "failed" in each["event"] or "refused" in each["event"]]
