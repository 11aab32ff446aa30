"""Controllers of one's own, from a file beside the job's: the one of the manual, and those that cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import SettingsError
from fedbio.federation.workflows.script import END
from fedbio.tensors import open_file

from .test_script_fedavg import SITES, Runs, assert_same, mean, reference, runs

__all__ = ["runs"]

MANUAL = Path(__file__).parents[2] / "docs" / "federation.md"


def controller_of_the_manual() -> str:
    blocks = re.findall(r"```python\n(.*?)```", MANUAL.read_text(), re.S)
    [code] = [each for each in blocks if "(ScriptController)" in each]
    return str(code)


def test_controller_of_the_manual_averages(runs: Runs) -> None:
    code = controller_of_the_manual()
    assert len([line for line in code.splitlines() if line.strip()]) <= 26
    (runs.code / "mine.py").write_text(code)
    jobs = {"workflow": "custom", "controller": "mine.py:Average", "name": "fedavg", "settings": {"keep": 0.5}}
    server = runs.federation.start(runs.federation.server(runs.jobs(**jobs), code=runs.code))
    sites = [runs.federation.start(runs.federation.site(name, runs.executors[name])) for name in SITES]
    for each in (server, *sites):
        each.result(60)
    # the scripts are told that there is no more to do
    assert all(runs.executors[site][END].rounds for site in SITES)
    found = dict(open_file(runs.models / "model.safetensors"))
    combine = mean([10, 20, 30])

    def half(models: Any) -> Any:
        # site-1 went half of the way to 1
        before = {name: 2 * value - np.float32(1) for name, value in models[0].items()}
        return {name: (before[name] + value) / 2 for name, value in combine(models).items()}

    assert_same(found, reference(4, half))


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
