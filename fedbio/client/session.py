"""One script's part in a job: the task that it has, and the form in which it keeps its parameters."""

from __future__ import annotations

__all__ = ["Session", "current", "enter", "leave", "offer"]

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
import numpy as np

from fedbio.client.analytics import in_words, kind_of
from fedbio.client.link import ABOUT, INITIAL, SOCKET, Link, Metric, SocketLink
from fedbio.client.model import FLModel, Form, from_script, to_script
from fedbio.errors import SettingsError
from fedbio.federation.model import Result, Task
from fedbio.federation.workflows.script import INIT

log = logging.getLogger(__name__)

PREFIX = "client/"
"""Before the names of a script's tasks on the wire."""

BEAT_S = 60.0
"""Seconds after which the first rank tells the others that they go on waiting: their collectives have deadlines of
their own, ten minutes with NCCL, and a round may take longer."""

BY_HAND = (
    "this script takes part in a federation, and here is none: it is started by a site. Name it in a job "
    "(client: {script: FILE.py}), and run the job with `fedbio server --jobs JOB.yaml` and `fedbio site`"
)


class Ranks(Protocol):
    """How processes that train together come to know what the first of them knows; `fedbio.client.ranks` is one way.

    All of them have to call the same functions in the same order.
    """

    def agree(self, value: bool) -> bool:
        """Return the first rank's value on every rank."""

    def share(self, task: Task | None, waits: bool) -> tuple[Task | None, bool]:
        """Return the first rank's task, or None, on every rank, and whether all of them go on waiting."""


class Session:
    """What the functions of the Client API work on.

    Parameters
    ----------
    link : Link or None
        The connection to the site; None on all ranks but the first.
    about : dict
        What the site tells of itself and the job.
    rank : int
        Of this process, among those that train together.
    default : callable, optional
        Returns ``"torch"`` or ``"numpy"``: how parameters come that the script has never sent.
    ranks : Ranks, optional
        If several processes train together.
    """

    def __init__(
        self,
        link: Link | None,
        about: dict[str, Any],
        rank: int = 0,
        *,
        default: Callable[[], str] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.link, self.rank = link, rank
        self.form = Form(default)
        self.about = about
        self.initial = False
        """Whether the script is loaded only for its initial model."""
        self.initial_model: Callable[[], FLModel] | None = None
        """Makes the initial model, for a script that is asked for it while it waits for its first task."""
        self.measured: dict[str, Any] | None = None
        """Metrics of the model at hand, which shall go with what it becomes."""
        self.evaluated = False
        """Whether the task that was received last is answered with metrics, and asks for no training."""
        self._ranks = ranks
        self._asks_whether_it_runs = False
        self._task: Task | None = None
        self._model: FLModel | None = None
        self._over = False

    @property
    def task(self) -> str:
        """The name of the task that was received last, or empty."""
        return "" if self._task is None else self._task.name.removeprefix(PREFIX)

    @property
    def has_model(self) -> bool:
        """Whether there is a model that was received and is not answered yet."""
        return self._model is not None

    @property
    def over(self) -> bool:
        """Whether there will be no more models."""
        return self._over

    def is_running(self) -> bool:
        """Wait until there is a model, or there will be none any more; return whether there is one."""
        self._check_not_initial()
        self._asks_whether_it_runs = True
        self._agree()
        return self._receive(None) is not None

    def receive(self, timeout_s: float | None) -> FLModel | None:
        """Return the model of the task at hand, or wait for the next one; None if none comes.

        Of several ranks, one alone may call it once all of them know from `is_running` that there is a model. In a
        script that never asks whether it runs, all of them have to call it each time.
        """
        self._check_not_initial()
        if not self._asks_whether_it_runs:
            self._agree()
        return self._receive(timeout_s)

    def _check_not_initial(self) -> None:
        if self.initial:
            raise RuntimeError(
                "the script waits for models while it is only loaded for its initial one; put what trains under "
                'if __name__ == "__main__":'
            )

    def _agree(self) -> None:
        """Have all ranks let go of a model that the first one has answered: the others may have sent nothing.

        Raises
        ------
        RuntimeError
            If this rank has sent an answer and the first one has not.
        """
        if self._ranks is None or self._over:
            return
        if not self._ranks.agree(self.has_model):
            self._model = None
        elif self._model is None:
            raise RuntimeError(
                f"rank {self.rank} has sent an answer, and rank 0, which alone talks to the site, has not; call send() "
                "on rank 0 or on all ranks"
            )

    def _receive(self, timeout_s: float | None) -> FLModel | None:
        if self._model is None and not self._over:
            task = self._next(timeout_s)
            if task is not None:
                self._task, self.evaluated, self.measured = task, False, None
                self._model = to_script(task.model, self.form)
        return self._model

    def _next(self, timeout_s: float | None) -> Task | None:
        if self._ranks is None:
            task = self._from_site(timeout_s)
            self._over |= task is None and timeout_s is None
            return task
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            task = self._from_site(BEAT_S if left is None else min(BEAT_S, left))
            # only the first rank knows
            waits = self.link is not None and task is None and not self.link.over and (left is None or left > BEAT_S)
            task, waits = self._ranks.share(task, waits)
            if not waits:
                self._over |= task is None and timeout_s is None
                return task

    def _from_site(self, timeout_s: float | None) -> Task | None:
        """Return the site's next task on the first rank; nothing on the others."""
        if self.link is None:
            return None
        task = self.link.receive(timeout_s)
        while task is not None and task.name == INIT and self.initial_model is not None:
            self._answer_with_initial(self.link, task, self.initial_model)
            task = self.link.receive(timeout_s)
        if task is not None:
            self.link.taken(task)
        return task

    def _answer_with_initial(self, link: Link, task: Task, make: Callable[[], FLModel]) -> None:
        """Answer the first task there is, before those that the script sees."""
        link.taken(task)
        self.initial = True
        try:
            answer = make()
        finally:
            self.initial = False
        link.answer(Result(task=task.id, model=from_script(answer, self.form)))

    def send(self, model: FLModel, clear: bool) -> None:
        """Answer the task at hand."""
        if not isinstance(model, FLModel):
            raise TypeError(f"send() takes an FLModel, not a {type(model).__name__}")
        if self._task is None or self._model is None:
            raise RuntimeError("there is no task to answer: call receive() before each send()")
        if model.params is None and model.metrics is None:
            raise RuntimeError("the model has neither params nor metrics; there is nothing to send")
        if self.link is not None:
            found = from_script(model, self.form)
            found.start_round = self._task.model.start_round
            found.current_round = self._task.model.current_round
            found.total_rounds = self._task.model.total_rounds
            self.link.answer(Result(task=self._task.id, model=found))
        self._model = None
        if clear:
            model.params = model.optimizer_params = None

    def log(self, key: str, value: Any, data_type: Any, step: int | None) -> None:
        """Send a number, numbers by name, or a text."""
        if self.link is None:
            return
        kind = kind_of(data_type, value)
        plain: Any
        if isinstance(value, str) or not kind.is_sent:
            plain = in_words(kind, value)
        elif isinstance(value, Mapping):
            plain = {str(name): _number(key, each) for name, each in value.items()}
        else:
            plain = _number(key, value)
        self.link.metric(Metric(str(key), plain, None if step is None else int(step), kind.value))

    def close(self) -> None:
        """End the connection; there will be no more models."""
        self._over, self._model = True, None
        if self.link is not None:
            self.link.close()


def _number(key: str, value: Any) -> float:
    try:
        return float(np.asarray(value.detach().cpu() if hasattr(value, "detach") else value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"log({key!r}): a {type(value).__name__} is neither a number nor a text") from error


_lock = threading.Lock()
_offered: dict[int, tuple[Link, Callable[[], str]]] = {}
_by_thread: dict[int, Session] = {}
_of_process: Session | None = None


def offer(link: Link, default: Callable[[], str]) -> None:
    """Have the script that runs on this thread of a site use a connection."""
    with _lock:
        _offered[threading.get_ident()] = (link, default)


def leave() -> None:
    """Forget this thread's connection and session."""
    with _lock:
        _offered.pop(threading.get_ident(), None)
        _by_thread.pop(threading.get_ident(), None)


def enter(rank: int | str | None = None) -> Session:
    """Begin the session of this script, or return it if it has begun.

    Raises
    ------
    SettingsError
        If no site has started this process.
    """
    global _of_process
    with _lock:
        thread = threading.get_ident()
        found = _by_thread.get(thread) or (None if thread in _offered else _of_process)
        if found is not None:
            log.warning("init() was called before; this call does nothing")
            return found
        if thread in _offered:
            offered, default = _offered[thread]
            session = _by_thread[thread] = Session(offered, offered.about, default=default)
            return session
        number = int(os.environ.get("RANK", "0") if rank is None else rank)
        socket = os.environ.get(SOCKET)
        if not socket:
            raise SettingsError(BY_HAND)
        several: Ranks | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # imported here: it is for those who have torch
            from fedbio.client import ranks

            several = ranks
        about = msgspec.json.decode(os.environ.get(ABOUT, "{}"), type=dict[str, Any])
        link = SocketLink(socket, about) if number == 0 else None
        _of_process = Session(link, about, number, ranks=several)
        if link is not None and (initial := os.environ.get(INITIAL)):
            # imported here: it builds on this module
            from fedbio.client.initial import made_apart

            _of_process.initial_model = made_apart(initial)
        return _of_process


def current() -> Session:
    """Return the session of this thread's script; threads that a script starts have their script's.

    Raises
    ------
    RuntimeError
        If `init` was not called.
    """
    with _lock:
        found = _by_thread.get(threading.get_ident()) or _of_process
        if found is None and len(_by_thread) == 1:
            # a thread that the only script in this process has started
            (found,) = _by_thread.values()
    if found is None:
        raise RuntimeError("call init() before any other function of the Client API")
    return found
