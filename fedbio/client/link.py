"""The script's end of the connection to its site: tasks come, answers and metrics go.

The connection is `fedbio.transport` over a Unix domain socket in a folder that nobody else may enter; the environment
says where. Models travel as tensors, from the socket into the memory that the script gets, and never as pickles.
"""

from __future__ import annotations

__all__ = [
    "ABOUT",
    "END",
    "INITIAL",
    "METRIC",
    "RECEIVED",
    "RESULT",
    "SCRIPT",
    "SOCKET",
    "TAKEN",
    "TASK",
    "Link",
    "Metric",
    "QueueLink",
    "Receipt",
    "SocketLink",
]

import os
import queue
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FederationError, ProtocolError
from fedbio.federation.messages import pack, unpack
from fedbio.federation.model import Result, Task, decode, encode
from fedbio.tensors import parse
from fedbio.transport import Limits, Opening, Presence, Received, Sink, SiteEndpoint, TensorPayload, Unencrypted

SOCKET = "FEDBIO_SOCKET"
"""Environment variable with the path of the socket."""

ABOUT = "FEDBIO_ABOUT"
"""Environment variable with what `system_info` returns, as JSON: every rank knows it, connected or not."""

INITIAL = "FEDBIO_INITIAL"
"""Environment variable with the file and the function of the initial model, as ``FILE:FUNCTION``."""

SCRIPT = "script"
"""The script's name on the connection."""

TASK = "task"
"""Site to script: a task."""
END = "end"
"""Site to script, empty: there is nothing left to do."""
RECEIVED = "received"
"""Site to script: `Receipt`."""
TAKEN = "taken"
"""Script to site: the id of the task that the script has begun with."""
RESULT = "result"
"""Script to site: a result."""
METRIC = "metric"
"""Script to site: `Metric`."""

LIMITS = Limits(max_handshakes=4, memory_bytes=1 << 30, resume_s=30.0)
HEARTBEAT_S = 60.0
"""The kernel tells at once when the other end is gone; a script that computes may show no life for long."""

CONNECT_S = 30.0
"""Seconds in which the site takes the script in."""

RECEIPT_S = 600.0
"""Seconds in which the site takes an answer, once all of it has arrived."""


class Metric(msgspec.Struct, frozen=True):
    """A number or a text that the script wants to be seen now."""

    key: str
    value: float | str | dict[str, float]
    step: int | None = None
    data_type: str = "SCALAR"


class Receipt(msgspec.Struct, frozen=True):
    """The site has a result, or does not take it and says why."""

    task: str
    refusal: str = ""


class Link(ABC):
    """A script's connection to its site. Any thread may send; one receives.

    Attributes
    ----------
    about : dict
        What the site tells of itself and of the job.
    """

    about: dict[str, Any]

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether it is known that there will be no more tasks."""

    @abstractmethod
    def receive(self, timeout_s: float | None) -> Task | None:
        """Wait for the next task; return None if there is none in time, or will be none any more."""

    @abstractmethod
    def taken(self, task: Task) -> None:
        """Tell the site that the script has begun with a task."""

    @abstractmethod
    def answer(self, result: Result) -> None:
        """Send a result and wait until the site has it.

        Raises
        ------
        FedbioError
            If it does not take it, or is gone.
        """

    @abstractmethod
    def metric(self, metric: Metric) -> None:
        """Send a metric."""

    @abstractmethod
    def close(self) -> None:
        """End the connection; no more tasks come."""


class SocketLink(Link):
    """A connection over a socket, for a script that is a process of its own.

    Parameters
    ----------
    path : str
        Of the socket.
    about : dict

    Raises
    ------
    PeerUnreachable
        If nobody listens there.
    """

    def __init__(self, path: str, about: dict[str, Any]) -> None:
        self.about = about
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._receipts: dict[str, Receipt] = {}
        self._changed = threading.Condition()
        self._gone = False
        self._endpoint = SiteEndpoint(
            path,
            Unencrypted(SCRIPT),
            # only for what is larger than all the memory that it may take
            spool=Path(tempfile.gettempdir()) / f"fedbio-script-{os.getpid()}",
            on_message=self._on_message,
            on_connection=self._on_connection,
            sinks={TASK: _WritableSink},
            connect_deadline_s=CONNECT_S,
            limits=LIMITS,
            heartbeat_s=HEARTBEAT_S,
            driver="local",
        ).start()

    @property
    def over(self) -> bool:
        return self._gone

    def receive(self, timeout_s: float | None) -> Task | None:
        if self._gone and self._tasks.empty():
            return None
        try:
            task = self._tasks.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if task is None:
            # the end stays the end, however often it is asked for
            self._gone = True
        return task

    def taken(self, task: Task) -> None:
        self._endpoint.send(TAKEN, task.id.encode())

    def answer(self, result: Result) -> None:
        body, tensors = encode(result)
        self._endpoint.send(RESULT, body, TensorPayload(tensors) if tensors else None)
        deadline = time.monotonic() + RECEIPT_S
        with self._changed:
            self._changed.wait_for(
                lambda: result.task in self._receipts or self._gone, max(0.0, deadline - time.monotonic())
            )
            receipt = self._receipts.pop(result.task, None)
        if receipt is None:
            raise FederationError("the site is gone, or does not take the answer; its log may tell why")
        if receipt.refusal:
            raise FederationError(f"the site does not take the answer: {receipt.refusal}")

    def metric(self, metric: Metric) -> None:
        self._endpoint.send(METRIC, pack(metric))

    def close(self) -> None:
        self._leave()
        self._endpoint.close()

    def _leave(self) -> None:
        with self._changed:
            self._gone = True
            self._changed.notify_all()
        self._tasks.put(None)

    def _on_connection(self, presence: Presence) -> None:
        if presence in (Presence.LOST, Presence.GONE):
            # on one machine a connection breaks only when the other end is gone
            self._leave()

    def _on_message(self, received: Received) -> None:
        if received.topic == TASK:
            self._tasks.put(decode(Task, received.body, parse(received.payload) if received.payload else {}))
        elif received.topic == END:
            self._tasks.put(None)
        elif received.topic == RECEIVED:
            receipt = unpack(Receipt, received.body)
            with self._changed:
                self._receipts[receipt.task] = receipt
                self._changed.notify_all()


class _WritableSink(Sink):
    """Memory for a model that the script may write to: its tensors are views of it."""

    waits = False

    def __init__(self, opening: Opening) -> None:
        if opening.size is None:
            raise ProtocolError("a task of unknown size")
        self._view = np.empty(opening.size, np.uint8).data
        self._filled = 0

    def write(self, chunk: memoryview) -> None:
        end = self._filled + len(chunk)
        self._view[self._filled : end] = chunk
        self._filled = end

    def finish(self) -> memoryview:
        return self._view


class QueueLink(Link):
    """A connection within the site's process.

    Parameters
    ----------
    about : dict
    on_taken, on_answer, on_metric : callable
        Called on the script's thread.
    """

    def __init__(
        self,
        about: dict[str, Any],
        on_taken: Callable[[str], None],
        on_answer: Callable[[Result], None],
        on_metric: Callable[[Metric], None],
    ) -> None:
        self.about = about
        self._on_taken, self._on_answer, self._on_metric = on_taken, on_answer, on_metric
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._gone = False
        self.resting = threading.Event()
        """Set while the script waits for a task."""

    def put(self, task: Task | None) -> None:
        """Give the script a task, or None: there are no more."""
        self._tasks.put(task)

    @property
    def over(self) -> bool:
        return self._gone

    def receive(self, timeout_s: float | None) -> Task | None:
        if self._gone:
            return None
        self.resting.set()
        try:
            task = self._tasks.get(timeout=timeout_s)
        except queue.Empty:
            return None
        finally:
            self.resting.clear()
        self._gone |= task is None
        return task

    def taken(self, task: Task) -> None:
        self._on_taken(task.id)

    def answer(self, result: Result) -> None:
        if self._gone:
            raise FederationError("the site has stopped the script; its log tells why")
        # copied: the script goes on with its own arrays while the site may have to send these again
        copied = {name: np.array(value) for name, value in result.model.params.items()}
        optimizer = {name: np.array(value) for name, value in result.model.optimizer_params.items()}
        model = msgspec.structs.replace(result.model, params=copied, optimizer_params=optimizer)
        self._on_answer(msgspec.structs.replace(result, model=model))

    def metric(self, metric: Metric) -> None:
        if not self._gone:
            self._on_metric(metric)

    def close(self) -> None:
        self._gone = True
        self._tasks.put(None)
