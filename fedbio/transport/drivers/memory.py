"""Move frames inside one process: the twin of the other drivers for tests of everything above them."""

from __future__ import annotations

__all__ = ["MemoryDriver"]

import itertools
import threading
from collections.abc import Callable

from fedbio.errors import MachineError
from fedbio.transport.credentials import Identity
from fedbio.transport.drivers.base import Connection, ConnectionClosed, Driver, Lane, Listener
from fedbio.transport.drivers.outbox import Outbox
from fedbio.transport.frames import Frame, header, payload_bytes
from fedbio.transport.limits import Limits

_listeners: dict[str, _MemoryListener] = {}
_lock = threading.Lock()
_ports = itertools.count(1)


class _MemoryConnection(Connection):
    def __init__(self, peer: str, address: str, incoming: Outbox, outgoing: Outbox) -> None:
        super().__init__(peer, address)
        self._incoming = incoming
        self._outgoing = outgoing

    def _receive(self) -> list[Frame]:
        frames = self._incoming.take()
        if frames is None:
            # what was written before our own `close` still arrives
            self._outgoing.close("closed by the peer", drop=self._outgoing.reason is None)
            raise ConnectionClosed(self._outgoing.reason)
        for frame in frames:
            payload_bytes(header(frame), self.allowed_bytes)
        return frames

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        self._outgoing.put(frame, lane)

    def close(self) -> None:
        self._outgoing.close("closed here", drop=False)
        self._incoming.close("closed here", drop=True)

    def abort(self) -> None:
        self._outgoing.close("closed here", drop=True)
        self._incoming.close("closed here", drop=True)


class _MemoryListener(Listener):
    def __init__(self, address: str) -> None:
        self.address = address
        self.on_connection: Callable[[Connection], None] | None = None
        self.connections: list[Connection] = []

    def start(self, on_connection: Callable[[Connection], None]) -> None:
        self.on_connection = on_connection

    def close(self) -> None:
        with _lock:
            _listeners.pop(self.address, None)
        for connection in self.connections:
            connection.abort()


class MemoryDriver(Driver):
    """Connections between two ends in this process; names are those in the certificates, if there are any."""

    def listen(self, address: str, credentials: Identity, limits: Limits) -> Listener:
        host, _, port = address.rpartition(":")
        with _lock:
            taken = f"{host}:{next(_ports)}" if port == "0" else address
            if taken in _listeners:
                raise MachineError(f"port {port} is in use in this process; choose another")
            listener = _listeners[taken] = _MemoryListener(taken)
        return listener

    def dial(self, address: str, credentials: Identity, timeout_s: float) -> Connection:
        name = credentials.check()
        with _lock:
            listener = _listeners.get(address)
        if listener is None or listener.on_connection is None:
            raise ConnectionClosed("connection refused")
        up, down = Outbox(), Outbox()
        there = _MemoryConnection(name, "memory", up, down)
        listener.connections.append(there)
        listener.on_connection(there)
        return _MemoryConnection("", address, down, up)
