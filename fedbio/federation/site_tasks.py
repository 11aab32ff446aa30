"""What a site does with a task: refuse it by its policy, or have its executor do it, and account for the time."""

from __future__ import annotations

__all__ = ["Tasks"]

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fedbio import __version__
from fedbio.errors import DataError, FedbioError, ScriptError
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.filters import Chain
from fedbio.federation.held import Held
from fedbio.federation.model import FLModel, Result, Status, Task
from fedbio.federation.party import Party
from fedbio.federation.policy import Policy

log = logging.getLogger(__name__)

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(kw_only=True)
class Tasks:
    """Does tasks, one at a time; the fields are those of `fedbio.federation.Site`."""

    executors: Mapping[str, Executor]
    allow: Sequence[str]
    quantization: Sequence[str]
    policy: Policy
    incoming: Chain
    outgoing: Chain
    prepare: Callable[[Collection[str]], None] | None
    party: Party
    held: Held
    failure: FedbioError | None = None
    """What the last task that failed has failed with."""

    def do(self, task: Task, context: SiteContext) -> Result:
        """Do a task, or say why not.

        Raises
        ------
        Exception
            Other than `FedbioError`: the disk is full, or there is a bug.
        """
        executor = self.executors.get(task.name)
        refusal = self._refusal(task, executor, context.site)
        if executor is None or refusal:
            log.warning("task refused task=%s reason=%s", task.name, refusal)
            self.party.events.write("task refused", task=task.name, id=task.id, job=task.job, reason=refusal)
            return Result(task=task.id, status=Status.REFUSED, reason=refusal)
        context.job = task.job
        if self.prepare is not None:
            self.prepare((task.workflow,))
        started = time.monotonic()
        try:
            model = self.incoming(self._with_held(task.model), task=task.name)
            answer = executor.execute(task, model, context)
            result = Result(task=task.id, model=self.outgoing(answer, task=task.name))
        except FedbioError as error:
            log.error("task failed task=%s reason=%s", task.name, error)
            self.failure = error
            lines = error.last_lines if isinstance(error, ScriptError) else ()
            result = Result(task=task.id, status=Status.FAILED, reason=_for_the_server(error), last_lines=lines)
        seconds = time.monotonic() - started
        stage = executor.stage or executor.kind
        self.party.record.seconds[stage] = self.party.record.seconds.get(stage, 0.0) + seconds
        self.party.events.write(
            "task done" if result.status is Status.DONE else "task failed",
            task=task.name, id=task.id, job=task.job, round=task.model.current_round, seconds=round(seconds, 4),
        )  # fmt: skip
        return result

    def _refusal(self, task: Task, executor: Executor | None, site: str) -> str:
        """Return why a task is not done here; empty if it is."""
        if executor is None:
            return f"this site's fedbio {__version__} knows no task {task.name!r}"
        if executor.kind not in self.allow:
            refusal = f"the policy of {site} does not allow {executor.kind!r} (allowed: {', '.join(self.allow)})"
            return f"{refusal}; {_how_code_is_allowed(task)}" if executor.kind == "code" else refusal
        if task.answer_scheme not in (None, *self.quantization):
            allowed = ", ".join(self.quantization) or "none"
            return f"the policy of {site} lets no model leave as {task.answer_scheme} (allowed: {allowed})"
        # what the server says of the job, and what it has come to
        if problem := self.policy.problem(task.workflow, max(task.rounds, task.model.current_round)):
            return f"the policy of {site}: it {problem}"
        return ""

    def _with_held(self, model: FLModel) -> FLModel:
        """Add the parameters that the server knows to be here."""
        if not model.held:
            return model
        held = self.held.model(model.held, model.current_round)
        return msgspec.structs.replace(model, params={**model.params, **held})


def _how_code_is_allowed(task: Task) -> str:
    """Say what the site's operator does, with the names of the task's files where they are plain names."""
    sent = task.model.meta.get("files")
    each = [one.get("name") if isinstance(one, Mapping) else one for one in sent] if isinstance(sent, list) else []
    names = [name for name in each if isinstance(name, str) and _PLAIN.fullmatch(name)] or ["FILE"]
    options, them = " ".join(f"--code {name}" for name in names), "it" if len(names) == 1 else "them"
    return (
        f"to let it run, its operator reads {' and '.join(names)}, and names {them} with {options}, or in site.yaml "
        f"with `allow: [..., code]` and `code: [{', '.join(names)}]`"
    )


def _for_the_server(error: FedbioError) -> str:
    """Return what may leave of a failure: a message about data can name a protein or quote it, and stays here."""
    if isinstance(error, DataError):
        return "its own data are refused; its log says where and why"
    return str(error)
