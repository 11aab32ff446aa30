"""Executors that processes of a pool find by their name: NumPy alone, and what a test needs to see of them."""

from __future__ import annotations

import os
import time
from typing import ClassVar

import conftest
import numpy as np

from fedbio.errors import DataError
from fedbio.federation import Executor, FLModel, SiteContext, Task


class Train(Executor):
    """Adds noise of the site's own and of the round; notes in which process."""

    name: ClassVar[str] = "train"
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def __init__(self) -> None:
        self.calls = 0

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        self.calls += 1
        with open(context.workspace / "calls", "a") as calls:
            calls.write(f"{os.getpid()} {model.current_round} {self.calls}\n")
        # a test may hold it up in one round
        held = context.workspace.parent / "hold"
        while held.exists() and held.read_text() == f"{context.site} {model.current_round}":
            time.sleep(0.02)
        random = np.random.default_rng([int(context.site[-1]), model.current_round])
        params = {
            name: value + random.normal(size=value.shape).astype(np.float32)
            for name, value in model.params.items()
            if name.startswith("layers.")
        }
        return FLModel(
            params=params, metrics=conftest._measured(model), meta={"weight": conftest.proteins_of(context.site)}
        )


class Broken(Train):
    """Fails at one site."""

    error: Exception

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        if context.site == "site-2" and model.current_round == 1:
            raise self.error
        return super().execute(task, model, context)


def _with(train: Executor) -> dict[str, Executor]:
    return {**conftest.fakes(), "train": train}


def executors() -> dict[str, Executor]:
    return _with(Train())


def with_bad_data() -> dict[str, Executor]:
    broken = Broken()
    broken.error = DataError("proteins.fasta:7: bad label")
    return _with(broken)


def with_a_bug() -> dict[str, Executor]:
    broken = Broken()
    broken.error = ZeroDivisionError("division by zero")
    return _with(broken)
