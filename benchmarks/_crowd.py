"""Many sites with real connections from few processes: each a `Site` on a thread, whose training takes no time."""

from __future__ import annotations

__all__ = ["play"]

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedbio.federation import Executor, FLModel, Site, SiteContext, Task
from fedbio.federation.model import WEIGHT
from fedbio.federation.workflows.script import DEPLOY, END, EVALUATE, EXAMPLES, TRAIN
from fedbio.settings import KitFile, load
from fedbio.transport import Credentials


class _Played(Executor):
    """A task of a script, without the script."""

    kind = "train"
    leaves = "model"

    def __init__(self, name: str, answer: Callable[[FLModel], FLModel]) -> None:
        self.name, self._answer = name, answer  # type: ignore[misc]

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        return self._answer(model)


def _executors() -> dict[str, Executor]:
    answers: dict[str, Callable[[FLModel], FLModel]] = {
        DEPLOY: lambda model: FLModel(meta={EXAMPLES: 100}),
        TRAIN: lambda model: FLModel(params=model.params, metrics={"accuracy": 0.5}, meta={WEIGHT: 100}),
        EVALUATE: lambda model: FLModel(metrics={"accuracy": 0.5}),
        END: lambda model: FLModel(),
    }
    return {name: _Played(name, answer) for name, answer in answers.items()}


def play(state: dict[str, Any], folder: str, names: Sequence[str], address: str) -> None:
    """Take part as several sites, until the server has no more to do.

    Parameters
    ----------
    state : dict
        Of the `_processes.Party` that calls it.
    folder : str
        With ``kits/NAME``; each site's workspace is ``NAME``.
    names : sequence of str
    address : str
        The server's.
    """
    failures: list[BaseException] = []

    def one(name: str) -> None:
        kit = Path(folder) / "kits" / name
        try:
            Site(
                kit=load(kit / "kit.yaml", KitFile),
                credentials=Credentials.from_kit(kit),
                workspace=Path(folder) / name,
                data=Path("none.fasta"),
                executors=_executors(),
                allow=("train",),
                server=address,
            ).run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise failures[0]
