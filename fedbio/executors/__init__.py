"""What a site does when it is handed a task; found by the task's name. Heavy libraries load with the first task."""

from __future__ import annotations

__all__ = ["load_libraries", "registry"]

from fedbio.federation.executor import Executor


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


def load_libraries() -> None:
    """Import what tasks need, so that the first one does not wait for it."""
    import fedbio.classifier.alone
    import fedbio.classifier.data
    import fedbio.encoder.embed  # noqa: F401
