"""The site's end of the connection to a script: hands tasks over, and tells its owner what comes back."""

from __future__ import annotations

__all__ = ["Answered", "Event", "Host", "QueueHost", "Rejected", "SocketHost", "Taken"]

import contextlib
import logging
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedbio.client.link import (
    ABOUT,
    END,
    HEARTBEAT_S,
    LIMITS,
    METRIC,
    RECEIVED,
    RESULT,
    SCRIPT,
    SOCKET,
    TAKEN,
    TASK,
    Metric,
    QueueLink,
    Receipt,
)
from fedbio.errors import FedbioError, ProtocolError, TransportError
from fedbio.federation.messages import pack, unpack
from fedbio.federation.model import Result, Task, decode, encode
from fedbio.transport import Presence, Received, ServerEndpoint, TensorPayload, Unencrypted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """The script has begun with a task."""

    task: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The script has answered a task."""

    result: Result


@dataclass(frozen=True, slots=True)
class Rejected:
    """The script's end did not take a task."""

    task: str
    reason: str


Event = Taken | Answered | Rejected

OnMetric = Callable[[str, float | str | dict[str, float], int | None, str], None]
"""Takes key, value, step and type of what a script logs."""


class Host(ABC):
    """A site's connection to one run of a script.

    Parameters
    ----------
    about : mapping
        What `fedbio.client.system_info` returns in the script.
    on_event : callable
        Takes each `Event`, on any thread.
    on_metric : callable
        Takes key, value, step and type of each metric, on any thread.
    """

    def __init__(self, about: Mapping[str, Any], on_event: Callable[[Event], None], on_metric: OnMetric) -> None:
        self._about, self._on_event, self._on_metric = dict(about), on_event, on_metric

    @abstractmethod
    def give(self, task: Task) -> None:
        """Hand a task over as soon as the script is there; returns at once."""

    @abstractmethod
    def say_end(self) -> None:
        """Tell the script that there is nothing left to do."""

    @abstractmethod
    def close(self) -> None:
        """End the connection; may be called twice."""

    def _measured(self, metric: Metric) -> None:
        self._on_metric(metric.key, metric.value, metric.step, metric.data_type)


class SocketHost(Host):
    """A connection over a Unix domain socket in a folder of mode 0700.

    Parameters
    ----------
    about, on_event, on_metric
        See `Host`.
    spool : Path
        A folder for answers that are too large for memory.

    Attributes
    ----------
    address : str
        Path of the socket.
    environment : dict of str to str
        What tells the script where to connect, and what `about` says.
    """

    def __init__(
        self, about: Mapping[str, Any], on_event: Callable[[Event], None], on_metric: OnMetric, spool: Path
    ) -> None:
        super().__init__(about, on_event, on_metric)
        # not in the workspace, whose path may be longer than the 107 bytes that a socket's may have
        self.address = str(Path(tempfile.mkdtemp(prefix="fedbio-")) / "socket")
        self.environment = {SOCKET: self.address, ABOUT: msgspec.json.encode(self._about).decode()}
        self._here = threading.Event()
        self._over = False
        self._endpoint = ServerEndpoint(
            self.address,
            Unencrypted("site"),
            spool=spool,
            on_message=self._on_message,
            on_peer=self._on_peer,
            name="site",
            limits=LIMITS,
            heartbeat_s=HEARTBEAT_S,
            driver="local",
        ).start()

    def give(self, task: Task) -> None:
        threading.Thread(target=self._give, args=(task,), name="to-script", daemon=True).start()

    def _give(self, task: Task) -> None:
        self._here.wait()
        if self._over:
            return
        body, tensors = encode(task)
        try:
            self._endpoint.send(SCRIPT, TASK, body, TensorPayload(tensors) if tensors else None)
        except TransportError as error:
            self._on_event(Rejected(task.id, str(error)))

    def say_end(self) -> None:
        # not waited for: a script that ends at once does not say that it has heard it
        threading.Thread(target=self._say_end, name="end-to-script", daemon=True).start()

    def _say_end(self) -> None:
        # one that still loads its libraries hears it when it is there
        self._here.wait()
        if not self._over:
            with contextlib.suppress(TransportError):
                self._endpoint.send(SCRIPT, END)

    def close(self) -> None:
        self._over = True
        self._here.set()
        self._endpoint.close()
        with contextlib.suppress(OSError):
            Path(self.address).unlink(missing_ok=True)
            Path(self.address).parent.rmdir()

    def _on_peer(self, name: str, presence: Presence) -> None:
        if name == SCRIPT and presence is Presence.ARRIVED:
            self._here.set()

    def _on_message(self, received: Received) -> None:
        if self._over or received.peer != SCRIPT:
            return
        try:
            self._take(received)
        except FedbioError as error:
            log.warning("message of the script not taken topic=%s reason=%s", received.topic, error)

    def _take(self, received: Received) -> None:
        if received.topic == TAKEN:
            self._on_event(Taken(received.body.decode("ascii", "replace")))
        elif received.topic == METRIC:
            self._measured(unpack(Metric, received.body))
        elif received.topic == RESULT:
            tensors = {} if received.payload is None else received.payload.tensors()
            result = decode(Result, received.body, tensors)
            self._on_event(Answered(result))
            # not before its owner has it: the script may end with this
            self._endpoint.send(SCRIPT, RECEIVED, pack(Receipt(result.task)))
        else:
            raise ProtocolError(f"unknown topic {received.topic!r}; do both ends run one release?")


class QueueHost(Host):
    """A connection to a script in this process; see `Host`.

    Attributes
    ----------
    link : QueueLink
        The script's end.
    """

    def __init__(self, about: Mapping[str, Any], on_event: Callable[[Event], None], on_metric: OnMetric) -> None:
        super().__init__(about, on_event, on_metric)
        self.link = QueueLink(
            self._about,
            lambda task: on_event(Taken(task)),
            lambda result: on_event(Answered(result)),
            self._measured,
        )

    def give(self, task: Task) -> None:
        self.link.put(task)

    def say_end(self) -> None:
        self.link.put(None)

    def close(self) -> None:
        self.link.close()
