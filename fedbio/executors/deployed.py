"""One job's script at a site: its files, its run, and the conversation with it."""

from __future__ import annotations

__all__ = ["DeployedScript"]

import contextlib
import hashlib
import logging
import os
import queue
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from fedbio.client.host import Answered, Event, Host, QueueHost, Rejected, SocketHost, Taken
from fedbio.client.initial import answer_with_initial
from fedbio.client.launch import (
    SHOWN_CHARACTERS,
    Ending,
    Run,
    RunningProcess,
    RunningThread,
    as_program,
    process_command,
    run_in_thread,
)
from fedbio.client.link import INITIAL
from fedbio.client.turns import OwnState
from fedbio.errors import DataError, FederationError, ScriptError
from fedbio.federation.executor import SiteContext
from fedbio.federation.model import FLModel, Task
from fedbio.federation.workflows.script import ClientSpec, CodeFile

log = logging.getLogger(__name__)

POLITE_S, FIRM_S = 20.0, 5.0
"""Seconds that a script has to end by itself after it was told to, and after SIGTERM."""

GIVE_UP_S = 3.0
"""Seconds after SIGTERM for a script that hangs."""

_TORCH = re.compile(rb"^\s*(import|from)\s+(torch|lightning|pytorch_lightning|transformers)\b", re.MULTILINE)


class _Conversation:
    """One run of a script, and the connection to it."""

    def __init__(self, own: OwnState, last_lines: int) -> None:
        self.own, self.last_lines = own, last_lines
        self.events: queue.SimpleQueue[Event | Ending | None] = queue.SimpleQueue()
        self.ending: Ending | None = None
        self.stopped = False
        self.host: Host
        self.run: Run

    def stop(self, polite_s: float, firm_s: float) -> None:
        """Tell the script that there is nothing left to do, and see it end."""
        self.host.say_end()
        self.run.stop(polite_s, firm_s)
        self.host.close()

    def rest(self, timeout_s: float) -> None:
        """Wait until a script of this process asks for its next task, or has ended."""
        if isinstance(self.run, RunningThread):
            self.run.rest(timeout_s)

    def give_up(self) -> None:
        """Have `ask` return at once, on whatever thread it is."""
        self.stopped = True
        self.events.put(None)

    def has_ended(self) -> bool:
        """Whether the script ended after its last task; says so in the log if it did not end well."""
        while self.ending is None:
            try:
                event = self.events.get_nowait()
            except queue.Empty:
                return False
            if isinstance(event, Ending):
                self._note(event)
        return True

    def _note(self, ending: Ending) -> None:
        self.ending = ending
        if ending.code:
            log.warning(
                "the script %s while it had no task; it is started anew:\n%s", ending, _block(self.run.last_lines())
            )

    def ask(self, task: Task, idle_s: float, *, fresh: bool) -> FLModel | None:
        """Have the script do a task.

        Parameters
        ----------
        task : Task
        idle_s : float
            Seconds that it may take.
        fresh : bool
            Whether the script was started for it.

        Returns
        -------
        FLModel or None
            The answer; None if the script ended without having begun: well, or when it was done with another task.

        Raises
        ------
        FederationError
            If it fails, or does not answer in time.
        """
        deadline, taken = time.monotonic() + idle_s, False
        self.host.give(task)
        while True:
            try:
                event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise self.failure(f"has not answered within {idle_s:g} s and was ended") from None
            if self.stopped or event is None:
                raise FederationError("the script was stopped: its job, or the site, ends")
            if isinstance(event, Ending):
                if not taken and (event.code == 0 or not fresh):
                    self._note(event)
                    return None
                self.ending = event
                raise self.failure(f"{event} before it had answered")
            if isinstance(event, Rejected) and event.task == task.id:
                raise self.failure(f"did not take its task ({event.reason})")
            if isinstance(event, Taken):
                taken |= event.task == task.id
            elif isinstance(event, Answered) and event.result.task == task.id:
                return event.result.model

    def failure(self, what: str) -> ScriptError:
        """Return the error of a script, with those of its last lines that may leave; this site's log has them all."""
        shown, last = self.run.exception(), self.run.last_lines()
        if last == [shown]:
            # nothing but what the error says
            return ScriptError(f"the script {what}: {shown}")
        log.error("the script %s; its last lines (%s):\n%s", what, self.run.log, _block(last))
        told = [line[:SHOWN_CHARACTERS] for line in last[-self.last_lines :]] if self.last_lines else []
        return ScriptError(f"the script {what}{': ' if shown else ''}{shown}; the site's log has its last lines", told)


def _block(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


class DeployedScript:
    """A job's script, ready to run.

    Parameters
    ----------
    job : str
    spec : ClientSpec
    context : SiteContext
    examples : int
        What the site registers for the job.

    Raises
    ------
    DataError
        If a file is not what the server announced.
    """

    def __init__(self, job: str, spec: ClientSpec, context: SiteContext, examples: int) -> None:
        self.job, self.spec, self.examples = job, spec, examples
        self._context = context
        self._folder = context.workspace.resolve() / "scripts" / job
        self._code = self._folder / "code"
        self._lock = threading.Lock()
        """Held while a task is done."""
        self._current: _Conversation | None = None
        self._talking: _Conversation | None = None
        self._stopped = False
        self._remarks: set[str] = set()
        self._copy()

    def start(self) -> None:
        """Start the script before there is a task for it: what it loads is loaded while others get ready.

        One that fails fails again with its first task, for which it is started anew.
        """
        with self._lock:
            if self._current is None and not self._stopped:
                self._current = self._start()

    def ask(self, task: Task, model: FLModel) -> FLModel:
        """Have the script do a task; it is started if it does not run.

        Raises
        ------
        FederationError
            If it crashes, ends without an answer, or takes too long.
        """
        handed = _handed(task, model)
        with self._lock:
            while True:
                fresh = self._current is None or self._current.has_ended()
                own = OwnState(self._code) if self._current is None or fresh else self._current.own
                with self._turn(own) as shared:
                    if fresh:
                        self._leave()
                        self._current = self._start(own)
                    assert self._current is not None
                    answer = self._talk(self._current, handed, fresh=fresh)
                    if shared:
                        # what it still does after its answer is its turn as well
                        self._current.rest(self.spec.idle_s)
                if answer is not None:
                    return answer
                if fresh:
                    failure = self._current.failure("ended without having asked for a model (flare.receive)")
                    self._leave()
                    raise failure

    def initial(self, task: Task, model: FLModel) -> FLModel:
        """Have a function of the script make the initial model: by the script, if it has begun, or in its own run.

        Raises
        ------
        FederationError
            If there is none, or it fails.
        """
        if self.spec.initial is None:
            raise FederationError(f"job {self.job} names no function for the initial model (client.initial)")
        handed = _handed(task, model)
        with self._lock:
            answer = None if self._current is None else self._talk(self._current, handed, fresh=False)
            if answer is not None and answer.params:
                return answer
            own = OwnState(self._code)
            with self._turn(own):
                conversation = self._start(own, initial=True)
                try:
                    answer = self._talk(conversation, handed, fresh=True)
                    if answer is None or not answer.params:
                        raise conversation.failure(f"has no initial model in {self.spec.initial}")
                    return answer
                finally:
                    conversation.stop(FIRM_S, FIRM_S)

    def remark(self, words: str, *values: object) -> None:
        """Say something of the script's answers in the site's log, once in its job."""
        if words not in self._remarks:
            self._remarks.add(words)
            log.warning(f"%s job=%s: {words}", self.spec.script, self.job, *values)

    def stop(self, *, politely: bool = True) -> None:
        """End the script; a task that it is doing fails. May be called on any thread, and twice."""
        self._stopped = True
        if (conversation := self._talking) is not None:
            conversation.give_up()
        with self._lock:
            self._leave(POLITE_S if politely else 0.0)

    def _talk(self, conversation: _Conversation, task: Task, *, fresh: bool) -> FLModel | None:
        self._talking = conversation
        if self._stopped:
            raise FederationError(f"job {self.job} is over at this site")
        try:
            return conversation.ask(task, self.spec.idle_s, fresh=fresh)
        except FederationError:
            # nobody knows what state it is in: the next task starts it anew
            conversation.stop(0.0, GIVE_UP_S)
            if conversation is self._current:
                self._current = None
            raise
        finally:
            self._talking = None

    def _leave(self, polite_s: float = 0.0) -> None:
        if self._current is not None:
            with self._turn(self._current.own, wait=polite_s > 0):
                self._current.stop(polite_s, FIRM_S)
            self._current = None

    def _turn(self, own: OwnState, *, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
        """Put a script's own state in place, if it shares this process with those of other sites."""
        return own.turn(wait=wait) if self.spec.launch == "in_process" else contextlib.nullcontext(False)

    def _start(self, own: OwnState | None = None, *, initial: bool = False) -> _Conversation:
        self._folder.joinpath("files").mkdir(parents=True, exist_ok=True)
        conversation = _Conversation(own or OwnState(self._code), self._context.policy.last_lines)
        about, path = self._about(), self._folder / "script.log"
        log.info("script started job=%s script=%s log=%s", self.job, self.spec.initial or self.spec.script, path)
        if self.spec.launch == "in_process":
            inside = QueueHost(about, conversation.events.put, self._on_metric)
            conversation.host = inside
            conversation.run = RunningThread(
                lambda: self._run_here(initial),
                inside.link,
                "torch" if self._uses_torch() else "numpy",
                path,
                conversation.events.put,
            )
        else:
            outside = SocketHost(about, conversation.events.put, self._on_metric, self._folder / "spool")
            conversation.host = outside
            conversation.run = RunningProcess(
                self._command(initial),
                self._code,
                {**os.environ, **self._environment(about), **outside.environment},
                path,
                outside.address,
                conversation.events.put,
            )
        return conversation

    @property
    def _script(self) -> Path:
        return self._code / self.spec.script

    def _command(self, initial: bool) -> list[str]:
        if initial:
            file, _, function = str(self.spec.initial).partition(":")
            command = process_command("-m", ["fedbio.client.initial", str(self._code / file), function], None)
        else:
            ranks = self.spec.processes if self.spec.launch == "torchrun" else None
            command = process_command(str(self._script), self.spec.arguments, ranks)
        return command

    def _run_here(self, initial: bool) -> None:
        """Run the script, or its function for the initial model, on this thread."""
        with as_program(self._script, self.spec.arguments):
            if initial:
                file, _, function = str(self.spec.initial).partition(":")
                answer_with_initial(self._code / file, function)
            else:
                run_in_thread(self._script)

    def _about(self) -> dict[str, Any]:
        context = self._context
        return {
            "site_name": context.site,
            "job_id": self.job,
            "data": str(context.data.resolve()),
            "workspace": str(self._folder / "files"),
            "labels": None if context.labels is None else str(context.labels.resolve()),
            "embeddings": str(context.embeddings.resolve()) if context.embeddings.exists() else None,
            "device": context.device,
            "threads": context.threads,
            "rounds": self.spec.rounds,
            "workflow": self.spec.workflow,
        }

    def _environment(self, about: dict[str, Any]) -> dict[str, str]:
        names = ("site_name", "job_id", "data", "workspace")
        found = {f"FEDBIO_{name.upper()}": about[name] for name in names}
        if self._context.threads is not None:
            found["OMP_NUM_THREADS"] = str(self._context.threads)
        if self.spec.initial is not None:
            found[INITIAL] = str(self._code / self.spec.initial)
        # what it writes is in its log also when it is killed
        return {**found, "PYTHONUNBUFFERED": "1"}

    def _uses_torch(self) -> bool:
        """Whether the script imports torch: in this process it may be loaded without the script's doing."""
        return any(_TORCH.search((self._code / each.name).read_bytes()) for each in self.spec.files)

    def _on_metric(self, key: str, value: float | str | dict[str, float], step: int | None, data_type: str) -> None:
        if isinstance(value, dict):
            for name, number in value.items():
                self._context.track(f"{key}/{name}", number, step, job=self.job)
        elif isinstance(value, str):
            # a text may quote the site's data: it stays here
            log.info("script says key=%s text=%s", key, value)
        else:
            self._context.track(key, value, step, job=self.job)

    def _copy(self) -> None:
        """Put the files that were received into a folder of the script's own."""
        if self._code.exists():
            shutil.rmtree(self._code)
        self._code.mkdir(parents=True)
        received = self._context.received(self.spec.group)
        for each in self.spec.files:
            (self._code / each.name).write_bytes(_content(received / each.name, each))


def _content(path: Path, file: CodeFile) -> bytes:
    """Return a file's bytes, if they are those that the server announced."""
    if not path.is_file():
        raise DataError(f"{path}: the server has announced this file and not sent it")
    if path.stat().st_size != file.size:
        raise DataError(f"{path}: {path.stat().st_size} bytes, the server announced {file.size}")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise DataError(f"{path}: SHA-256 {found}, the server announced {file.sha256}")
    return content


def _handed(task: Task, model: FLModel) -> Task:
    """Return what the script is given: nothing of how its answer will travel."""
    bare = msgspec.structs.replace(model, held="")
    return Task(name=task.name, model=bare, job=task.job, id=task.id)
