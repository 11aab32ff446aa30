"""Real processes that are killed without warning, at every point and at any moment: the model's bits are the same."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbio.files import sha256_file
from fedbio.provision import provision
from fedbio.settings import FederationFile

pytestmark = [pytest.mark.faults, pytest.mark.slow]

PARTY = Path(__file__).with_name("numpy_party.py")
NAMES = ("server", "site-1", "site-2", "site-3")
ROUNDS = 4
KILLS = 50

POINTS = [
    ("server", "before send:12"),
    ("server", "after send:15"),
    ("server", "in send:2"),  # the task of round 0, on its way to the sites
    ("server", "in send:9"),
    ("server", "before aggregation:2"),
    ("server", "in aggregation:2"),
    ("server", "after aggregation:2"),
    ("server", "before optimizer:3"),
    ("server", "after optimizer:3"),
    ("server", "before save:3"),
    ("server", "in save:3"),
    ("server", "after store:3"),
    ("server", "after save:3"),
    ("site-2", "before task:3"),
    ("site-2", "after task:4"),
    ("site-2", "before send:4"),
    ("site-2", "in send:1"),
    ("site-2", "in send:4"),
    ("site-2", "after send:4"),
]


class Processes:
    """A federation whose parties are processes."""

    def __init__(self, folder: Path, port: int, rounds: int) -> None:
        self.folder, self.address = folder, f"localhost:{port}"
        settings = {"federation": "test", "server": {"address": self.address}, "sites": list(NAMES[1:])}
        provision(FederationFile.model_validate(settings), folder / "kits")
        (folder / "train.py").write_text("print('played by NumPy')\n")
        job = {
            "workflow": "fedavg",
            "client": {"script": "train.py", "initial": "train.py:net"},
            "rounds": rounds,
            "optimizer": {"name": "adam", "learning_rate": 0.1},
        }
        limits = {"join_deadline_s": 60, "round_deadline_s": 120, "heartbeat_s": 2}
        (folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job], "federation": limits}))
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, point: str = "") -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [sys.executable, str(PARTY), name, str(self.folder), self.address, point]
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def finish(self) -> str:
        """Return the digest of the last model."""
        for name, process in self.running.items():
            assert process.wait(120) == 0, f"{name}:\n" + (self.folder / f"{name}.log").read_text()[-3000:]
        return sha256_file(self.folder / "server" / "models" / "fedavg" / "last.safetensors")

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, free_port: int) -> Iterator[Any]:
    made: list[Processes] = []

    def make(rounds: int) -> Processes:
        made.append(Processes(tmp_path_factory.mktemp("run"), free_port, rounds))
        return made[-1]

    yield make
    for each in made:
        each.end()


def unbroken(make: Any, rounds: int) -> str:
    run = make(rounds)
    for name in NAMES:
        run.start(name)
    digest: str = run.finish()
    return digest


def test_killed_at_a_named_point_and_started_again_ends_with_the_same_model(make: Any) -> None:
    expected = unbroken(make, ROUNDS)
    for victim, point in POINTS:
        run = make(ROUNDS)
        for name in NAMES:
            run.start(name, point if name == victim else "")
        assert run.running[victim].wait(60) == -signal.SIGKILL, (victim, point)
        run.start(victim)
        assert run.finish() == expected, (victim, point)


def test_server_that_is_killed_has_no_site_train_twice_in_a_round(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEFUL", "1")
    expected = unbroken(make, ROUNDS)
    for point in ("in send:5", "in aggregation:2", "before send:15", "in save:3"):
        run = make(ROUNDS)
        for name in NAMES:
            run.start(name, point if name == "server" else "")
        assert run.running["server"].wait(60) == -signal.SIGKILL, point
        run.start("server")
        assert run.finish() == expected, point


def test_killed_at_fifty_random_moments_ends_with_the_same_model(make: Any) -> None:
    rounds = 500
    expected = unbroken(make, rounds)
    dice = random.Random(4)
    run = make(rounds)
    for name in NAMES:
        run.start(name)
    killed = 0
    while killed < KILLS:
        time.sleep(dice.uniform(0.1, 0.9))
        victim = dice.choice(NAMES)
        assert run.running[victim].poll() is None, f"{victim} ended after {killed} kills; give it more rounds"
        run.running[victim].kill()
        run.running[victim].wait()
        run.start(victim)
        killed += 1
    assert run.finish() == expected
