"""What a driver provides: connections that move whole frames between two ends, in order, each end proven."""

from __future__ import annotations

__all__ = ["HANDSHAKE_BYTES", "Connection", "ConnectionClosed", "Driver", "Lane", "Listener", "Source"]

import collections
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from fedbio.errors import PeerUnreachable
from fedbio.transport.credentials import Identity
from fedbio.transport.frames import Frame
from fedbio.transport.limits import Limits

HANDSHAKE_BYTES = 64 << 10
"""The largest payload of a frame before the handshake is over."""


class ConnectionClosed(PeerUnreachable):
    """The connection has ended, from either end or between; another one may be dialled."""


class Lane(enum.Enum):
    """How a frame travels beside others."""

    URGENT = enum.auto()
    """Ahead of bulk frames, without waiting."""
    LAZY = enum.auto()
    """As urgent, but it may wait a moment for another frame to leave with."""
    BULK = enum.auto()
    """When the link is ready for it, in order among its like."""


Source = Callable[[], Frame | None]
"""Makes the next bulk frame; None if there is none for now, and it will be offered again."""


class Connection(ABC):
    """Two opposite flows of frames. One thread reads; any number of threads write."""

    pulls = False
    """Whether it takes frames from a source, on the thread that sends them: see `offer`."""

    def __init__(self, peer: str, address: str) -> None:
        self.peer = peer
        """The other end's name, as its certificate gives it; empty at the dialling end, which has checked the host."""
        self.address = address
        """Where the other end is, for messages."""
        self.allowed_bytes = HANDSHAKE_BYTES
        """The largest payload of a frame that is read; whoever has made the handshake raises it."""
        self._arrived: collections.deque[Frame] = collections.deque()

    def read(self) -> Frame:
        """Wait for the next frame.

        Raises
        ------
        ConnectionClosed
            When there will be none.
        ProtocolError
            If what arrived is no sound frame; nobody knows what the next bytes mean, so the connection must be ended.
        """
        while not self._arrived:
            self._arrived.extend(self._receive())
        return self._arrived.popleft()

    @abstractmethod
    def _receive(self) -> Sequence[Frame]:
        """Wait for the next frames; check lengths against `allowed_bytes` before taking memory for them."""

    @abstractmethod
    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        """Pass a frame on; raise `ConnectionClosed` if it cannot be. Only bulk frames make the writer wait.

        The payload is not copied and must not change until the frame's stream is over.
        """

    def offer(self, source: Source) -> None:
        """Have bulk frames made when the link is ready for them, by a source that never waits, until it gives None.

        A driver whose library sends on a thread of its own saves each frame the way there from another processor's
        cache. Raises `ConnectionClosed` like `write`.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Let what was written leave, then end both flows; returns at once and may be called twice."""

    @abstractmethod
    def abort(self) -> None:
        """End both flows now."""


class Listener(ABC):
    """A place where connections arrive."""

    address: str
    """``host:port`` with the real port, also when port 0 was asked for."""

    @abstractmethod
    def start(self, on_connection: Callable[[Connection], None]) -> None:
        """Accept from now on; `on_connection` runs on a thread of the driver and returns at once."""

    @abstractmethod
    def close(self) -> None:
        """Stop accepting and end every connection, within two seconds."""


class Driver(ABC):
    """One way to move frames."""

    @abstractmethod
    def listen(self, address: str, credentials: Identity, limits: Limits) -> Listener:
        """Take the address; raise `MachineError` if it is in use. Connections arrive after `Listener.start`."""

    @abstractmethod
    def dial(self, address: str, credentials: Identity, timeout_s: float) -> Connection:
        """Connect once; raise `RefusedError` if another try is pointless, else `ConnectionClosed` with the cause."""
