"""The executors of swarm learning, and a guard: in a job of a swarm the server may not ask a script for its model."""

from __future__ import annotations

__all__ = ["with_swarm"]

from collections.abc import Callable, Mapping
from typing import ClassVar

from fedbio.errors import RefusedError
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import FLModel, Task
from fedbio.federation.swarm_folder import has_begun
from fedbio.federation.swarm_site import SwarmSite
from fedbio.federation.workflows import swarm_words
from fedbio.federation.workflows.script import DEPLOY, EVALUATE, INIT, SUBMIT_MODEL, TRAIN, ClientSpec
from fedbio.federation.workflows.study import read_meta

WORKFLOW = "swarm"

Do = Callable[[Task, FLModel, SiteContext], FLModel]


def with_swarm(executors: Mapping[str, Executor]) -> dict[str, Executor]:
    """Return a site's executors together with those of swarm learning.

    Parameters
    ----------
    executors : mapping of str to Executor
        By task. Those of training scripts are called by the swarm's; the server cannot call them in a swarm's job.
    """
    local = dict(executors)
    swarm = SwarmSite(local)
    table: list[tuple[str, str, Do]] = [
        (swarm_words.MEET, "control", swarm.meet),
        (swarm_words.BEGIN, "control", swarm.begin),
        (swarm_words.SHARE, "sealed", swarm.share),
        (swarm_words.TRAIN, "sealed", swarm.train),
        (swarm_words.AGGREGATE, "sealed", swarm.aggregate),
        (swarm_words.ADOPT, "control", swarm.adopt),
        (swarm_words.EVALUATE, "metrics", swarm.evaluate),
        (swarm_words.FINISH, "control", swarm.finish),
    ]
    closed: set[str] = set()
    guarded = {
        name: _Guarded(local[name], closed) for name in (DEPLOY, INIT, TRAIN, EVALUATE, SUBMIT_MODEL) if name in local
    }
    return local | guarded | {name: _SwarmTask(name, leaves, do, swarm) for name, leaves, do in table}


class _SwarmTask(Executor):
    stage: ClassVar[str] = WORKFLOW

    def __init__(self, name: str, leaves: str, do: Do, swarm: SwarmSite) -> None:
        self.name, self.leaves = name, leaves  # type: ignore[misc]
        # what the site's operator allows a script to do for the server, it may do for the swarm
        self.kind = "evaluate" if name == swarm_words.EVALUATE else "train"  # type: ignore[misc]
        self._do, self._swarm = do, swarm

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Do the task."""
        return self._do(task, model, context)

    def abandon(self, job: str) -> None:
        self._swarm.forget(job)

    @property
    def at_rest(self) -> bool:
        return self._swarm.at_rest


class _Guarded(Executor):
    """A script's executor, as the server may use it.

    Parameters
    ----------
    executor : Executor
    closed : set of str
        Jobs of swarms that were deployed here, shared by all of a site's guards.
    """

    def __init__(self, executor: Executor, closed: set[str]) -> None:
        self.name, self.kind, self.leaves = executor.name, executor.kind, executor.leaves  # type: ignore[misc]
        self.stage = executor.stage  # type: ignore[misc]
        self._executor, self._closed = executor, closed

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Do the task, unless its answer would show the server a swarm's model."""
        deploys = task.name == DEPLOY
        if deploys and read_meta(model.meta, ClientSpec).workflow == WORKFLOW:
            self._closed.add(task.job)
        elif task.job in self._closed or has_begun(context.workspace, task.job):
            raise RefusedError(
                f"job {task.job} was begun as a swarm at {context.site}: {task.name} of the server would show it what "
                "sites seal for each other"
            )
        return self._executor.execute(task, model, context)

    def abandon(self, job: str) -> None:
        self._executor.abandon(job)

    def close(self) -> None:
        self._executor.close()

    @property
    def at_rest(self) -> bool:
        return self._executor.at_rest
