"""The examples, as a reader runs them: a server with the job, and sites that let the script run."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

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


CRASHING = """
import os, pathlib, time
import numpy as np
import fedbio.client as flare

flare.init()
folder = pathlib.Path(flare.system_info()["workspace"])
while flare.is_running():
    model = flare.receive()
    (folder / f"round-{model.current_round}").write_text(str(os.getpid()))
    if flare.get_site_name() == "site-2" and model.current_round == 1 and not (folder / "again").exists():
        (folder / "again").touch()
        WHAT
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"accuracy": 0.5}))
"""


def start_crashing(
    parties: Parties, what: str, *, launch: str = "process", last_lines: int = 0, **limits: object
) -> list[subprocess.Popen[bytes]]:
    """Start a job of three rounds whose script does something at site-2, once, in round 1."""
    folder = parties.folder / "job"
    folder.mkdir()
    (folder / "train.py").write_text(CRASHING.replace("WHAT", what))
    save_file({"w": np.zeros(4, np.float32)}, folder / "first.safetensors")
    job = {
        "workflow": "fedavg",
        "client": {"script": "train.py", "launch": launch},
        "rounds": 3,
        "model": "first.safetensors",
    }
    content = {"jobs": [job], "federation": {"heartbeat_s": 2, "join_deadline_s": 60, **limits}}
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    kit, output = parties.folder / "kits/server", parties.folder / "server"
    server = parties.start("server", "server", "--kit", str(kit), "--jobs", str(folder / "job.yaml"), "-o", str(output))
    options = ["--code", str(folder / "train.py"), "--set", f"last_lines={last_lines}"]
    return [server, *(parties.site(name, *options) for name in SITES)]


def last_model(parties: Parties) -> list[float]:
    return list(load_file(parties.folder / "server/models/fedavg/last.safetensors")["w"])


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "processes_at_site", "last_lines"), [("process", 2, 4), ("in_process", 1, 0)])
def test_script_that_crashes_costs_its_site_one_round(
    parties: Parties, launch: str, processes_at_site: int, last_lines: int
) -> None:
    what = "raise ValueError('no memory left')"
    limits = {"min_sites": 2, "round_deadline_s": 30}
    processes = start_crashing(parties, what, launch=launch, last_lines=last_lines, **limits)
    assert [each.wait(120) for each in processes] == [0] * 4, parties.log("server")
    assert last_model(parties) == [3.0] * 4
    events = [json.loads(line) for line in (parties.folder / "server/events.jsonl").read_text().splitlines()]
    [failed] = [each for each in events if each["event"] == "task failed"]
    assert failed["site"] == "site-2"
    assert "ValueError: no memory left" in failed["reason"]
    assert "Traceback" in parties.log("site-2")
    # what the script has written leaves its site as far as its operator lets it
    assert len(failed.get("last_lines", [])) == last_lines
    assert ("raise ValueError" in parties.log("server")) == ("raise ValueError" in str(failed)) == bool(last_lines)
    pids = {(parties.folder / f"site-2/scripts/fedavg/files/round-{number}").read_text() for number in range(4)}
    assert len(pids) == processes_at_site


@pytest.mark.slow
@pytest.mark.faults
def test_site_that_is_killed_while_its_script_trains_goes_on_when_it_is_back(parties: Parties) -> None:
    server, first, second, third = start_crashing(parties, "time.sleep(1000)", round_deadline_s=100)
    files = parties.folder / "site-2/scripts/fedavg/files"
    deadline = time.monotonic() + 60
    while not (files / "again").exists():
        assert time.monotonic() < deadline, parties.log("site-2")
        time.sleep(0.05)
    script = int((files / "round-1").read_text())
    second.kill()
    second.wait()
    while Path(f"/proc/{script}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    back = parties.site("site-2", "--code", str(parties.folder / "job/train.py"))
    assert [each.wait(120) for each in (server, first, back, third)] == [0] * 4, parties.log("server")
    assert last_model(parties) == [3.0] * 4
