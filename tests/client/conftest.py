"""A site's executors of scripts with everything real beneath them: processes, sockets, files."""

from __future__ import annotations

import hashlib
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedbio.executors.script import (
    Deploy,
    EndScript,
    EvaluateScript,
    InitializeScript,
    Scripts,
    SubmitModel,
    TrainScript,
)
from fedbio.federation import FLModel, SiteContext, Task
from fedbio.federation.policy import ANY, Policy
from fedbio.federation.workflows.script import ClientSpec, CodeFile
from fedbio.federation.workflows.study import meta
from fedbio.results import EventLog, PartyRecord, utc_now

LOOP = """
import numpy as np
import fedbio.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
"""


@dataclass
class ScriptSite:
    """A site of one job."""

    context: SiteContext
    scripts: Scripts = field(default_factory=Scripts)
    metrics: list[tuple[str, str, float, int | None]] = field(default_factory=list)

    def receive(self, files: dict[str, str], **settings: Any) -> ClientSpec:
        """Put files where a site keeps what the server streamed, and return their specification."""
        encoded = {name: textwrap.dedent(text).encode() for name, text in files.items()}
        spec = ClientSpec(
            workflow="fedavg",
            files=tuple(
                CodeFile(name, hashlib.sha256(content).hexdigest(), len(content)) for name, content in encoded.items()
            ),
            **{"script": "train.py", "idle_s": 60.0, "rounds": 2, **settings},
        )
        received = self.context.received(spec.group)
        received.mkdir(parents=True, exist_ok=True)
        for name, content in encoded.items():
            (received / name).write_bytes(content)
        return spec

    def deploy(self, script: str, **settings: Any) -> ClientSpec:
        """Deploy a script, after what every script begins with unless it begins with a line of its own."""
        text = textwrap.dedent(script)
        spec = self.receive({"train.py": text, **settings.pop("files", {})}, **settings)
        answer = Deploy(self.scripts).execute(self.task("client/deploy"), FLModel(meta=meta(spec)), self.context)
        assert answer.meta == {"examples": 30}
        return spec

    def task(self, name: str) -> Task:
        return Task(name=name, model=FLModel(), job="job-1")

    def train(self, model: FLModel) -> FLModel:
        return TrainScript(self.scripts).execute(self.task("client/train"), model, self.context)

    def evaluate(self, model: FLModel) -> FLModel:
        return EvaluateScript(self.scripts).execute(self.task("client/evaluate"), model, self.context)

    def initialize(self) -> FLModel:
        return InitializeScript(self.scripts).execute(self.task("client/init"), FLModel(), self.context)

    def submit(self) -> FLModel:
        return SubmitModel(self.scripts).execute(self.task("client/submit_model"), FLModel(), self.context)

    def end(self) -> None:
        EndScript(self.scripts).execute(self.task("client/end"), FLModel(), self.context)

    @property
    def files(self) -> Path:
        """The script's own folder."""
        return self.context.workspace / "scripts/job-1/files"

    @property
    def log(self) -> str:
        """What the script has written."""
        return (self.context.workspace / "scripts/job-1/script.log").read_text()


def make_context(folder: Path) -> SiteContext:
    """A site that registers 30 examples and runs whatever the server sends."""
    workspace = folder / "workspace"
    workspace.mkdir()
    return SiteContext(
        site="site-1",
        workspace=workspace,
        data=folder / "proteins.fasta",
        record=PartyRecord("site-1", "site", started=utc_now()),
        events=EventLog(workspace, "site-1"),
        policy=Policy(code=frozenset({ANY})),
        examples=30,
    )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ScriptSite]:
    found = ScriptSite(make_context(tmp_path))
    found.context.on_metric = lambda *metric: found.metrics.append(metric)
    yield found
    Deploy(found.scripts).close()
    found.context.events.close()


def alive(process: int) -> bool:
    """Whether a process runs; one that is dead and not waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_left_in_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets and folders of scripts are gone after each test."""
    temporary = Path(os.path.realpath("/tmp")) / f"fedbio-test-{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield
    left = sorted(str(path) for path in temporary.iterdir())
    for path in temporary.iterdir():
        (path / "socket").unlink(missing_ok=True)
        path.rmdir()
    temporary.rmdir()
    assert left == []
