"""Controllers of one's own, from a file beside the job's: the one of the manual, and those that cannot be loaded."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedbio.errors import SettingsError
from fedbio.federation import FLModel
from fedbio.federation.workflows.script import END, TRAIN
from fedbio.files import sha256_file
from fedbio.settings import JobsFile
from fedbio.tensors import open_file

from .test_kills import NAMES, make
from .test_script_fedavg import SITES, Runs, assert_same, mean, reference, runs

__all__ = ["make", "runs"]

MANUAL = Path(__file__).parents[2] / "docs" / "federation.md"


def block_of_the_manual(name: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", MANUAL.read_text(), re.S)
    [code] = [each for each in blocks if f"class {name}(" in each]
    return str(code)


def test_controller_of_the_manual_averages(runs: Runs) -> None:
    code = block_of_the_manual("Average")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (runs.code / "mine.py").write_text(code)
    jobs = {"workflow": "custom", "controller": "mine.py:Average", "name": "fedavg", "settings": {"keep": 0.5}}
    server = runs.federation.start(runs.federation.server(runs.jobs(**jobs), code=runs.code))
    sites = [runs.federation.start(runs.federation.site(name, runs.executors[name])) for name in SITES]
    for each in (server, *sites):
        each.result(60)
    # the scripts are told that there is no more to do
    assert all(runs.executors[site][END].rounds for site in SITES)
    found = dict(open_file(runs.models / "model-4.safetensors"))
    combine = mean([10, 20, 30])

    def half(models: Any) -> Any:
        # site-1 went half of the way to 1
        before = {name: 2 * value - np.float32(1) for name, value in models[0].items()}
        return {name: (before[name] + value) / 2 for name, value in combine(models).items()}

    assert_same(found, reference(4, half))


@pytest.mark.slow
@pytest.mark.faults
def test_controller_of_the_manual_goes_on_where_its_server_was_killed(make: Any) -> None:
    found = []
    # between a round's model and its number, and before its model
    for point in ("", "after store:2", "before store:3"):
        run = make(4)
        (run.folder / "mine.py").write_text(block_of_the_manual("Average"))
        jobs = yaml.safe_load((run.folder / "jobs.yaml").read_text())
        client = jobs["jobs"][0]["client"]
        custom = {"workflow": "custom", "controller": "mine.py:Average", "rounds": 4, "settings": {"keep": 0.5}}
        (run.folder / "jobs.yaml").write_text(yaml.safe_dump({**jobs, "jobs": [{**custom, "client": client}]}))
        for name in NAMES:
            run.start(name, point if name == "server" else "")
        if point:
            assert run.running["server"].wait(60) == -signal.SIGKILL
            run.start("server")
        for name, process in run.running.items():
            assert process.wait(60) == 0, (run.folder / f"{name}.log").read_text()[-3000:]
        events = [json.loads(line) for line in (run.folder / "server" / "events.jsonl").read_text().splitlines()]
        rounds = [each["round"] for each in events if (each["event"], each.get("task")) == ("task sent", TRAIN)]
        # at most the round that was under way is done again
        assert len(rounds) == (5 if point else 4), rounds
        found.append(sha256_file(run.folder / "server" / "models" / "custom" / "model-4.safetensors"))
    assert found[1:] == found[:1] * 2


def test_executor_and_filter_of_the_manual(federation: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(block_of_the_manual("Length"))
    own: dict[str, Any] = {}
    exec(block_of_the_manual("MeanLength"), own)
    jobs = JobsFile.model_validate({"jobs": [{"workflow": "custom", "controller": "mine.py:Length"}]})
    server = federation.start(federation.server(jobs, code=tmp_path))
    sites = []
    for number, name in enumerate(SITES, 1):
        data = tmp_path / f"{name}.fasta"
        data.write_text(f">a\n{'MK' * number}\n>b\n{'MKV' * 2 * number}\n")
        here = {"server": federation.address, "driver": "memory", "connect_deadline_s": 20}
        sites.append(federation.start(own["site"](tmp_path / "kits" / name, data, tmp_path / name, **here)))
    for each in (server, *sites):
        each.result(60)
    [event] = [
        json.loads(line)
        for line in (tmp_path / "server" / "events.jsonl").read_text().splitlines()
        if '"event":"mean length"' in line
    ]
    assert (event["job"], event["value"]) == ("custom", 8.0)
    assert own["Chain"]([own["ClipNorm"](10.0, tasks=("client/train",))])(
        FLModel(params={"w": np.full(100, 10.0)}), task="client/train"
    ).params["w"][0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "there is no file mine.py"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("class Mine: pass", "no class Mine that is a fedbio.federation.Controller"),
        ("def Mine(): pass", "no class Mine"),
    ],
)
def test_controller_that_cannot_be_loaded_is_said_clearly(runs: Runs, code: str | None, said: str) -> None:
    if code is not None:
        (runs.code / "mine.py").write_text(code)
    jobs = runs.jobs(workflow="custom", controller="mine.py:Mine", name="mine")
    server = runs.federation.start(runs.federation.server(jobs, code=runs.code))
    # a server whose job names no file does not even listen
    for name in SITES if code is not None else ():
        runs.federation.start(runs.federation.site(name, runs.executors[name]))
    with pytest.raises(SettingsError, match=said):
        server.result(60)
