"""What a site does when it is handed a task; found by the task's name. Heavy libraries load with the first task."""

from __future__ import annotations

__all__ = ["WITH_TORCH", "load_libraries", "registry"]

import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path

from fedbio.federation.executor import Executor

WITH_TORCH = frozenset({"classify", "embed", "split"})
"""Workflows whose tasks need torch in the site's own process."""

_loaded = False


def registry() -> dict[str, Executor]:
    """Return fresh executors by the names of their tasks; they share the site's data in memory."""
    from fedbio.executors.embed import Embed, Weights
    from fedbio.executors.projection import Project, Scatter, ShowMap
    from fedbio.executors.publish import Publish
    from fedbio.executors.script import (
        Deploy,
        EndScript,
        EvaluateScript,
        InitializeScript,
        Scripts,
        SubmitModel,
        TrainScript,
    )
    from fedbio.executors.shelf import Shelf
    from fedbio.executors.split import AlignRows, FinishPart, Meet, SplitParts, TrainPart
    from fedbio.executors.statistics import CountProteins, Describe, SumMoments
    from fedbio.executors.training import Evaluate, Initialize, Train, TrainAlone, Validate
    from fedbio.federation.swarm_executors import with_swarm

    shelf, scripts = Shelf(), Scripts()
    parts = SplitParts(scripts)
    executors: list[Executor] = [
        Weights(),
        Embed(),
        Describe(shelf),
        SumMoments(shelf),
        CountProteins(),
        Initialize(),
        Train(shelf),
        Validate(shelf),
        TrainAlone(shelf),
        Evaluate(shelf),
        Publish(),
        Scatter(shelf),
        Project(shelf),
        ShowMap(),
        Deploy(scripts),
        InitializeScript(scripts),
        TrainScript(scripts),
        EvaluateScript(scripts),
        SubmitModel(scripts),
        EndScript(scripts),
        Meet(parts),
        AlignRows(parts),
        TrainPart(parts),
        FinishPart(parts),
    ]
    return with_swarm({each.name: each for each in executors})


def load_libraries(workflows: Collection[str] = WITH_TORCH) -> None:
    """Import what tasks of these workflows need, so that the first one does not wait for it.

    A script imports what it needs in a process of its own: for its jobs there is nothing to load here.

    Parameters
    ----------
    workflows : collection of str
        Of the jobs that this site may get tasks of.
    """
    global _loaded
    if _loaded or not WITH_TORCH.intersection(workflows):
        return
    _loaded = True
    _read_through("torch")
    import fedbio.classifier.alone
    import fedbio.classifier.data
    import fedbio.encoder.embed  # noqa: F401


def _read_through(package: str) -> None:
    """Have a package's shared libraries in the memory of the kernel before they are linked.

    The linker holds the interpreter until it has all of a library, which takes many seconds from a cold disk, and no
    thread could show the server that this site lives. Reading a file does not.
    """
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None or spec.origin is None:
        return
    buffer = bytearray(1 << 20)
    for path in sorted((Path(spec.origin).parent / "lib").glob("*.so*")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
