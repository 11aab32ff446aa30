"""What a driver provides: connections that move whole frames between two ends, in order, each end proven."""

from __future__ import annotations

__all__ = ["Connection", "ConnectionClosed", "Driver", "Listener"]

from abc import ABC, abstractmethod
from collections.abc import Callable

from fedbio.errors import PeerUnreachable
from fedbio.transport.credentials import Credentials
from fedbio.transport.limits import Limits


class ConnectionClosed(PeerUnreachable):
    """The connection has ended, from either end or between; another one may be dialled."""


class Connection(ABC):
    """Two opposite flows of frames. One thread reads; any number of threads write."""

    peer: str
    """The other end's name as its certificate gives it; empty at the dialling end, which has checked the host."""
    address: str
    """Where the other end is, for messages."""

    @abstractmethod
    def read(self) -> bytes:
        """Wait for the next frame; raise `ConnectionClosed` when there will be none."""

    @abstractmethod
    def write(self, frame: bytes, *, bulk: bool = False) -> None:
        """Pass a frame on; raise `ConnectionClosed` if it cannot be.

        Bulk frames wait until the link is ready for them and keep their order among themselves; other frames go
        ahead of them and do not wait.
        """

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
    def listen(self, address: str, credentials: Credentials, limits: Limits) -> Listener:
        """Take the address; raise `MachineError` if it is in use. Connections arrive after `Listener.start`."""

    @abstractmethod
    def dial(self, address: str, credentials: Credentials, timeout_s: float) -> Connection:
        """Connect once; raise `RefusedError` if another try is pointless, else `ConnectionClosed` with the cause."""
