"""Cyclic weight transfer and evaluation with real scripts: a process of their own at every site."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from fedbio.executors.script import (
    Deploy,
    EndScript,
    EvaluateScript,
    InitializeScript,
    Scripts,
    SubmitModel,
    TrainScript,
)
from fedbio.federation import Executor
from fedbio.federation.policy import ANY, Policy
from fedbio.settings import JobsFile
from fedbio.tensors import open_file, write_file

SITES = ("site-1", "site-2", "site-3")

SCRIPT = """
import numpy as np
import fedbio.client as flare


def start():
    return {"w": np.ones(3, np.float32)}


def main():
    flare.init()
    own = None
    place = np.float32(flare.get_site_name()[-1])
    while flare.is_running():
        model = flare.receive()
        if flare.is_train():
            own = {"w": model.params["w"] * np.float32(0.7) + place}
            flare.send(flare.FLModel(params=own, metrics={"mean": float(model.params["w"].mean())}))
        elif flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"distance": float(np.abs(model.params["w"] - place).max())}))
        elif flare.is_submit_model():
            flare.send(flare.FLModel(params={"w": np.full(3, place)}))


if __name__ == "__main__":
    main()
"""


def executors() -> dict[str, Executor]:
    scripts = Scripts()
    kinds = (Deploy, InitializeScript, TrainScript, EvaluateScript, SubmitModel, EndScript)
    return {kind.name: kind(scripts) for kind in kinds}


def run(federation: Any, **job: Any) -> Path:
    """Run a job with the script and return its folder at the server."""
    (federation.folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    what = JobsFile.model_validate(
        {
            "jobs": [{"name": "job", "client": {"script": "train.py", "initial": "train.py:start"}, **job}],
            "federation": {"join_deadline_s": 20, "round_deadline_s": 60, "heartbeat_s": 0.5},
        }
    )
    server = federation.start(federation.server(what, code=federation.folder))
    sites = [
        federation.start(
            federation.site(
                name,
                executors(),
                allow=("code", "train", "evaluate"),
                policy=Policy(code=frozenset([ANY])),
                examples=10,
            )
        )
        for name in SITES
    ]
    for each in (server, *sites):
        each.result(90)
    return Path(federation.folder) / "server" / "models" / "job"


def test_model_goes_from_script_to_script(federation: Any) -> None:
    folder = run(federation, workflow="cyclic", rounds=2)
    expected = np.ones(3, np.float32)
    for _ in range(2):
        for place in (1, 2, 3):
            expected = expected * np.float32(0.7) + np.float32(place)
    np.testing.assert_array_equal(open_file(folder / "last.safetensors")["w"], expected)


def test_every_script_tries_every_model(federation: Any) -> None:
    write_file(federation.folder / "zero.safetensors", {"w": np.zeros(3, np.float32)})
    folder = run(federation, workflow="evaluation", models=["zero.safetensors"])
    with open(folder / "evaluation.csv", newline="") as file:
        found = {(row["model"], row["site"]): float(row["value"]) for row in csv.DictReader(file)}
    values = {"zero.safetensors": 0, "site-1": 1, "site-2": 2, "site-3": 3}
    assert found == {(model, site): abs(value - int(site[-1])) for model, value in values.items() for site in SITES}
