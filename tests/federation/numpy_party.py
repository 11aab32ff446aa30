"""A party as a process of its own: ``python numpy_party.py NAME FOLDER ADDRESS [POINT]``; scripts are played by NumPy.

POINT is where the process kills itself, ``PLACE:COUNT``: at the COUNTth time that it comes by. With STATEFUL in the
environment, a site's answers depend on how often it has trained, as those of a script do that keeps its optimizer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fedbio.federation.workflows.script_fedavg as workflow
from fedbio.federation import Executor, FLModel, Server, Site, SiteContext, Task
from fedbio.federation.model import WEIGHT
from fedbio.federation.state import State
from fedbio.federation.workflows.script import DEPLOY, END, EVALUATE, EXAMPLES, INIT, TRAIN
from fedbio.settings import JobsFile, KitFile, load
from fedbio.tensors.combine import BlockMean
from fedbio.transport import Credentials, ServerEndpoint, SiteEndpoint, TensorPayload

WIDTH = 600_000
"""Numbers in the model: its 2.4 MB travel in several chunks."""


TRAINED: list[int] = []
"""Rounds in which this process has trained."""


class Played(Executor):
    """A task of a script, in NumPy."""

    leaves = "model"

    def __init__(self, name: str, answer: Callable[[FLModel, SiteContext], FLModel]) -> None:
        self.name, self.kind, self.answer = name, "train", answer  # type: ignore[misc]

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        return self.answer(model, context)


def initial(model: FLModel, context: SiteContext) -> FLModel:
    return FLModel(params={"weight": np.random.default_rng(1).random(WIDTH, np.float32)})


def train(model: FLModel, context: SiteContext) -> FLModel:
    """Depend on everything that a wrong resumption could change: the model, the round, and the site."""
    TRAINED.append(model.current_round)
    times = len(TRAINED) if "STATEFUL" in os.environ else 0
    noise = np.random.default_rng([int(context.site[-1]), model.current_round, times]).random(WIDTH, np.float32)
    weight = model.params["weight"] * np.float32(0.9) + noise
    return FLModel(
        params={"weight": weight}, metrics={"accuracy": float(weight[0])}, meta={WEIGHT: int(context.site[-1])}
    )


ANSWERS: dict[str, Callable[[FLModel, SiteContext], FLModel]] = {
    DEPLOY: lambda model, context: FLModel(meta={EXAMPLES: int(context.site[-1])}),
    INIT: initial,
    TRAIN: train,
    EVALUATE: lambda model, context: FLModel(metrics={"accuracy": float(model.params["weight"][0])}),
    END: lambda model, context: FLModel(),
}


class Point:
    """Where the process shall be killed."""

    def __init__(self, text: str) -> None:
        self.place, _, count = text.partition(":")
        self.left = int(count or 0)

    def pass_by(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, place: str) -> None:
        """Come by before and after a function."""
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(f"before {place}")
            found = inner(*args, **kwargs)
            self.pass_by(f"after {place}")
            return found

        setattr(owner, name, wrapped)

    def in_aggregation(self) -> None:
        """Come by when half of a mean is there."""
        inner = BlockMean.__call__

        def halves(mean: BlockMean, runs: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
            half = len(out) // 2
            inner(mean, [run[:half] for run in runs], out[:half])
            self.pass_by("in aggregation")
            inner(mean, [run[half:] for run in runs], out[half:])

        BlockMean.__call__ = halves  # type: ignore[method-assign]

    def in_saves(self) -> None:
        """Come by when the file of a model is written, and has not got its name."""
        inner = os.replace

        def replace(source: Any, target: Any) -> None:
            if Path(target).suffix == ".safetensors":
                self.pass_by("in save")
            inner(source, target)

        os.replace = replace  # type: ignore[assignment]

    def in_uploads(self) -> None:
        """Come by between the chunks of every model that leaves."""
        inner = TensorPayload.chunks

        def chunks(payload: TensorPayload, start: int = 0) -> Iterator[memoryview]:
            for number, chunk in enumerate(inner(payload, start)):
                if number:
                    self.pass_by("in send")
                yield chunk

        TensorPayload.chunks = chunks  # type: ignore[method-assign]


def main(name: str, folder: Path, address: str, point: Point) -> None:
    kit = load(folder / "kits" / name / "kit.yaml", KitFile)
    credentials = Credentials.from_kit(folder / "kits" / name)
    point.in_uploads()
    if name == "server":
        point.in_aggregation()
        point.in_saves()
        for place, owner, function in (
            ("send", ServerEndpoint, "send"),
            ("aggregation", workflow.ScriptFedAvg, "aggregate"),
            ("save", State, "save"),
            ("optimizer", workflow.Beside, "save"),
            ("store", State, "store"),
        ):
            point.around(owner, function, place)
        jobs = load(folder / "jobs.yaml", JobsFile)
        Server(
            kit=kit,
            credentials=credentials,
            jobs=jobs,
            workspace=folder / name,
            listen=address,
            code=folder,
            driver="tcp",
        ).run()
        return
    point.around(SiteEndpoint, "send", "send")
    point.around(Played, "execute", "task")
    Site(
        kit=kit,
        credentials=credentials,
        workspace=folder / name,
        data=folder / f"{name}.fasta",
        executors={task: Played(task, answer) for task, answer in ANSWERS.items()},
        allow=("train",),
        server=address,
        driver="tcp",
        connect_deadline_s=60,
    ).run()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Point("".join(sys.argv[4:])))
