"""Tasks of training scripts: take the files in, have the script do each task, and end it.

A script is started with the first task that needs it, and anew when it has ended. What it does wrong is the failure of
its task: the site goes on.
"""

from __future__ import annotations

__all__ = ["Deploy", "EndScript", "EvaluateScript", "InitializeScript", "Scripts", "SubmitModel", "TrainScript"]

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import ClassVar

import msgspec

from fedbio.errors import FederationError, ProtocolError, RefusedError
from fedbio.executors.deployed import DeployedScript
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import WEIGHT, FLModel, Parameters, Task
from fedbio.federation.workflows.script import (
    DEPLOY,
    END,
    EVALUATE,
    EXAMPLES,
    EXCLUDE,
    INIT,
    SUBMIT_MODEL,
    TRAIN,
    ClientSpec,
)
from fedbio.federation.workflows.study import read_meta
from fedbio.files import write_whole

_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Scripts:
    """The scripts of a site's jobs."""

    def __init__(self) -> None:
        self._deployed: dict[str, DeployedScript] = {}

    def deploy(self, job: str, spec: ClientSpec, context: SiteContext) -> DeployedScript:
        """Get ready to run a job's script; one that is ready already goes on.

        Raises
        ------
        RefusedError
            If the site's operator does not let it run here.
        """
        check_spec(job, spec)
        for each in spec.files:
            if not context.policy.allows_code(each.sha256, each.name):
                refusal = f"the policy of {context.site} does not let {each.name} (SHA-256 {each.sha256}) run"
                if each.name in context.policy.files:
                    raise RefusedError(
                        f"{refusal}: its operator has named a {each.name} with other content; let the operator read "
                        "the job's file and put it in the place of that one, or add its SHA-256 to `code`"
                    )
                raise RefusedError(
                    f"{refusal}; let its operator read the file, and name it with --code {each.name} or add its "
                    "SHA-256 to `code` in the site's settings"
                )
        known = self._deployed.get(job)
        if known is not None and known.spec == spec:
            return known
        if known is not None:
            known.stop()
        self._deployed[job] = script = DeployedScript(job, spec, context, count_examples(context))
        write_whole(_spec_file(job, context), msgspec.json.encode(spec))
        return script

    def of(self, job: str, context: SiteContext) -> DeployedScript:
        """Return a job's script; a site's new process takes up that of the one before.

        Raises
        ------
        FederationError
            If there is none.
        """
        if job not in self._deployed:
            check_job(job)
            try:
                spec = msgspec.json.decode(_spec_file(job, context).read_bytes(), type=ClientSpec)
            except FileNotFoundError:
                raise FederationError(f"the script of job {job} is not here; it has to be deployed first") from None
            self.deploy(job, spec, context)
        return self._deployed[job]

    def forget(self, job: str, *, politely: bool) -> None:
        """Stop a job's script, if it is here."""
        script = self._deployed.pop(job, None)
        if script is not None:
            script.stop(politely=politely)

    def jobs(self) -> list[str]:
        """Return the jobs whose scripts are here."""
        return list(self._deployed)


class Deploy(Executor):
    """Takes a job's script in, if the site's operator lets it run here."""

    name: ClassVar[str] = DEPLOY
    kind: ClassVar[str] = "code"
    leaves: ClassVar[str] = "counts"

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Check the files and return how many examples this site registers."""
        spec = read_meta(model.meta, ClientSpec)
        script = self.scripts.deploy(task.job, spec, context)
        context.events.write("script deployed", job=task.job, files={each.name: each.sha256 for each in spec.files})
        # in this process it would hold up the answer; and a part of a network is not started at all
        if context.ahead and spec.launch != "in_process" and spec.workflow != "split":
            script.start()
        return FLModel(meta={EXAMPLES: script.examples})

    def abandon(self, job: str) -> None:
        self.scripts.forget(job, politely=False)

    @property
    def at_rest(self) -> bool:
        # a script keeps what it likes, and where it likes
        return not self.scripts.jobs()

    def close(self) -> None:
        for job in self.scripts.jobs():
            self.scripts.forget(job, politely=True)


class InitializeScript(Executor):
    """Has a function of the script make the initial model."""

    name: ClassVar[str] = INIT
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the initial model's parameters."""
        params = self.scripts.of(task.job, context).initial(task, model).params
        return FLModel(params=without_excluded(params, model))


class TrainScript(Executor):
    """Has the script train."""

    name: ClassVar[str] = TRAIN
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return what the script sends, with a weight: the script's own, but at most the number of registered examples.

        The state of an optimizer stays here: it is the site's own, and no server asks for it.
        """
        script = self.scripts.of(task.job, context)
        answer = script.ask(task, model)
        if not answer.params:
            raise FederationError(f"the script of {context.site} was asked to train and has sent no params")
        if answer.optimizer_params:
            script.remark("its optimizer_params stay at this site: no workflow averages them")
        return msgspec.structs.replace(
            answer,
            params=without_excluded(answer.params, model),
            optimizer_params={},
            meta={**answer.meta, WEIGHT: _weight(answer, script)},
        )


class EvaluateScript(Executor):
    """Has the script evaluate a model."""

    name: ClassVar[str] = EVALUATE
    kind: ClassVar[str] = "evaluate"
    leaves: ClassVar[str] = "metrics"

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the script's metrics, and nothing else of what it sends."""
        return FLModel(metrics=self.scripts.of(task.job, context).ask(task, model).metrics)


class SubmitModel(Executor):
    """Has the script hand in the site's own model."""

    name: ClassVar[str] = SUBMIT_MODEL
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the parameters and metrics that the script sends."""
        answer = self.scripts.of(task.job, context).ask(task, model)
        if not answer.params:
            raise FederationError(f"the script of {context.site} was asked for its model and has sent no params")
        return FLModel(params=answer.params, metrics=answer.metrics)


class EndScript(Executor):
    """Tells the script that there is nothing left to do, and sees it end."""

    name: ClassVar[str] = END
    kind: ClassVar[str] = "code"
    leaves: ClassVar[str] = "control"

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Stop the script; nothing but an empty answer leaves."""
        check_job(task.job)
        self.scripts.forget(task.job, politely=True)
        # no later process of this site takes it up
        _spec_file(task.job, context).unlink(missing_ok=True)
        return FLModel()


def _weight(answer: FLModel, script: DeployedScript) -> float:
    """Return an answer's weight, which a server does not take if it is above what the site has registered."""
    if WEIGHT not in answer.meta:
        return script.examples
    if answer.weight > script.examples:
        script.remark(
            "it claims a weight of %g, and this site has registered %d examples: it weighs %d; if it has more, set "
            "`examples:` in its settings, and if what is counted are steps, send no NUM_STEPS_CURRENT_ROUND",
            answer.weight,
            script.examples,
            script.examples,
        )
        return script.examples
    return answer.weight


def without_excluded(params: Parameters, model: FLModel) -> Parameters:
    """Return parameters but for those that stay at the site, by the patterns that the task's model came with."""
    patterns = [str(each) for each in model.meta.get(EXCLUDE) or ()]
    return {
        name: value
        for name, value in params.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def check_spec(job: str, spec: ClientSpec) -> None:
    """Refuse names from the server that are no plain names.

    Raises
    ------
    ProtocolError
        Naming what is wrong.
    """
    check_job(job)
    names: Mapping[str, int] = {each.name: each.size for each in spec.files}
    for name in names:
        if not _FILE.fullmatch(name) or PurePath(name).name != name:
            raise ProtocolError(f"a file called {name[:64]!r} is not taken; a plain name is needed")
    wanted = {spec.script} | ({spec.initial.partition(":")[0]} if spec.initial else set())
    if missing := sorted(wanted - set(names)):
        raise ProtocolError(f"{', '.join(missing)} of job {job} is not among the files that were sent")
    if spec.processes < 1 or not spec.idle_s > 0:
        raise ProtocolError(f"job {job} asks for {spec.processes} processes and {spec.idle_s} s; both must be positive")


def check_job(job: str) -> None:
    """Refuse a job's name that is no plain name; raises `ProtocolError`."""
    if not _JOB.fullmatch(job):
        raise ProtocolError(f"a script for a job called {job[:64]!r} is not taken; names are letters, digits, hyphens")


def _spec_file(job: str, context: SiteContext) -> Path:
    return context.workspace / "scripts" / job / "spec.json"


def count_examples(context: SiteContext) -> int:
    """Return how many examples a site registers: what its operator says, else the number of its proteins."""
    if context.examples is not None:
        return context.examples
    from fedbio.proteins import read

    return sum(1 for _ in read(context.data, labels=context.labels, classes=None))
