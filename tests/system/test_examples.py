"""The examples, as a reader runs them: a server with the job, and sites that let the script run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .conftest import SITES, Parties

EXAMPLES = Path(__file__).parents[2] / "examples"

NAMES = {
    "numpy": {"weight", "bias"},
    "sklearn": {f"{kind}.{layer}" for kind in ("coefs_", "intercepts_") for layer in range(3)},
    "torch": {
        *(f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")),
        *(f"1.{kind}" for kind in ("running_mean", "running_var", "num_batches_tracked")),
    },
}


def run_example(parties: Parties, example: str, *more: str) -> None:
    """Run an example's job with all sites and wait for everybody's end."""
    folder = EXAMPLES / example
    kit, output = parties.folder / "kits/server", parties.folder / "server"
    server = parties.start("server", "server", "--kit", str(kit), "--jobs", str(folder / "job.yaml"), "-o", str(output))
    sites = [parties.site(name, "--code", str(folder / "train.py"), *more) for name in SITES]
    assert [process.wait(120) for process in (server, *sites)] == [0] * 4, parties.log("server") + parties.log("site-1")


def script_log(parties: Parties, site: str) -> str:
    return (parties.folder / site / "scripts/fedavg/script.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("example", ["numpy", "sklearn", "torch"])
def test_example_trains_a_model_that_is_better_than_the_first(parties: Parties, example: str) -> None:
    run_example(parties, example)
    events = [json.loads(line) for line in (parties.folder / "server/events.jsonl").read_text().splitlines()]
    rounds = [each for each in events if each["event"] == "round"]
    assert [each["round"] for each in rounds] == [0, 1, 2]
    assert rounds[-1]["metrics"]["accuracy"] > max(0.8, rounds[0]["metrics"]["accuracy"])
    models = parties.folder / "server/models/fedavg"
    best, last = (load_file(models / f"{name}.safetensors") for name in ("best", "last"))
    assert set(best) == set(last) == NAMES[example]
    assert all(np.isfinite(value).all() for value in last.values())
    for site in SITES:
        # one process for all rounds, told to measure the last model and then to end
        assert script_log(parties, site).count("round ") == 3
        assert "round 2 of 2: accuracy" in script_log(parties, site)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"), [((), "does not allow 'code'"), (("--code", str(EXAMPLES / "torch/train.py")), "does not let")]
)
def test_sites_run_no_script_that_their_operators_did_not_name(
    parties: Parties, code: tuple[str, ...], reason: str
) -> None:
    kit, output = parties.folder / "kits/server", parties.folder / "server"
    job = str(EXAMPLES / "numpy/job.yaml")
    server = parties.start("server", "server", "--kit", str(kit), "--jobs", job, "-o", str(output))
    sites = [parties.site(name, *code) for name in SITES]
    assert server.wait(120) == 3
    assert all(site.wait(60) != 0 for site in sites)
    assert reason in parties.log("server")
    for site in SITES:
        assert not (parties.folder / site / "scripts").exists()
