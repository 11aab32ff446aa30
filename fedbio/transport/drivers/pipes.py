"""Bytes through a socket, plain or encrypted, and a window on those that have arrived."""

from __future__ import annotations

__all__ = ["Pipe", "SocketPipe", "TlsPipe", "Window"]

import contextlib
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

PIECE_BYTES = 256 << 10
"""Bytes that are encrypted or read at once: more would keep the other direction waiting."""

UNSENT_BYTES = 512 << 10
"""Bytes that may wait in the kernel before they leave: more would only delay what is urgent."""

STRANGER_BYTES = 64 << 10
"""Bytes that are read from a peer before it has proven who it is."""


class Pipe(ABC):
    """Two opposite flows of bytes; one thread receives, one sends."""

    @abstractmethod
    def receive(self, into: memoryview) -> int:
        """Wait for bytes and return how many have been put into the view; 0 at the end."""

    @abstractmethod
    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all the buffers."""

    @abstractmethod
    def finish(self) -> None:
        """Send the end."""

    @abstractmethod
    def trust(self) -> None:
        """Lift the bounds on a stranger's bytes and time."""

    @abstractmethod
    def cut(self) -> None:
        """End both flows now; whoever waits in one of them returns."""

    @abstractmethod
    def close(self) -> None:
        """Give the socket back; nobody may be using it."""


class SocketPipe(Pipe):
    """A socket as it is.

    Parameters
    ----------
    connected : socket
    deadline : float
        When a stranger must have proven who it is, on the monotonic clock.
    """

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self._deadline: float | None = deadline
        self._left = STRANGER_BYTES
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def receive(self, into: memoryview) -> int:
        if self._deadline is None:
            return self._socket.recv_into(into)
        return self._receive_bounded(into)

    def _receive_bounded(self, into: memoryview) -> int:
        if not self._left:
            raise OSError(f"it sent more than {STRANGER_BYTES} bytes before it had proven who it is")
        self._socket.settimeout(self._time_left())
        # past TLS, if there is some
        count = socket.socket.recv_into(self._socket, into[: self._left])
        self._left -= count
        return count

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        if self._deadline is not None:
            self._socket.settimeout(self._time_left())
        sent = self._socket.sendmsg(buffers)
        for buffer in buffers:
            if sent < len(buffer):
                self._socket.sendall(memoryview(buffer)[sent:])
            sent = max(0, sent - len(buffer))

    def _time_left(self) -> float:
        left = (self._deadline or 0.0) - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def trust(self) -> None:
        self._deadline = None
        self._socket.settimeout(None)

    def dismiss(self) -> None:
        """Send the end to a stranger and wait, bounded, for its own: else what it sends would wipe out our answer."""
        with contextlib.suppress(OSError):
            self.finish()
            while self._receive_bounded(memoryview(bytearray(4096))):
                pass

    def finish(self) -> None:
        # without TLS's own end: frames say what is whole, and an end that is forged is one more broken connection.
        # And not by TLS's own method, after which it would send in the clear
        socket.socket.shutdown(self._socket, socket.SHUT_WR)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class TlsPipe(SocketPipe):
    """TLS over a socket.

    OpenSSL allows one thread at a time in a connection: the socket never blocks, and no thread holds the lock while it
    waits for the link. What a stranger may send before its certificate is verified is bounded by OpenSSL.
    """

    def __init__(
        self, connected: socket.socket, deadline: float, context: ssl.SSLContext, host: str | None = None
    ) -> None:
        super().__init__(connected, deadline)
        self._lock = threading.Lock()
        connected.setblocking(False)
        self._socket = self._tls = context.wrap_socket(
            connected, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
        )

    def shake_hands(self) -> dict[str, Any] | None:
        """Prove both ends to each other and return the other's certificate."""
        while True:
            try:
                self._tls.do_handshake()
                return self._tls.getpeercert()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                self._wait(want)
            except ssl.SSLEOFError:
                raise EOFError("no TLS there: it hung up") from None

    @property
    def alpn(self) -> str | None:
        """What the two ends have agreed to speak."""
        return self._tls.selected_alpn_protocol()

    def receive(self, into: memoryview) -> int:
        while True:
            count = 0
            if self._tls.fileno() < 0:
                return 0  # closed here
            try:
                with self._lock:
                    while count < len(into) and (more := self._tls.read(len(into) - count, into[count:])):
                        count += int(more)
                return count
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                if count:
                    return count
                self._wait(want)

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                try:
                    with self._lock:
                        view = view[self._tls.write(view[:PIECE_BYTES]) :]
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                    self._wait(want)

    def _wait(self, want: ssl.SSLError) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN if isinstance(want, ssl.SSLWantReadError) else select.POLLOUT)
        poll.poll(None if self._deadline is None else self._time_left() * 1000)

    def trust(self) -> None:
        self._deadline = None


class Window:
    """What has arrived and has not been asked for: small reads come from here, large ones go past it."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self._buffer = memoryview(bytearray(32 << 10))
        self._ready = self._buffer[:0]

    def some(self, into: memoryview) -> int:
        """Wait for bytes and return how many have been put into the view; 0 at the end."""
        if not self._ready:
            if len(into) >= len(self._buffer):
                return self.pipe.receive(into)
            self._ready = self._buffer[: self.pipe.receive(self._buffer)]
        count = min(len(into), len(self._ready))
        into[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def exactly(self, size: int) -> memoryview:
        """Wait for that many bytes, in memory of their own; raise `EOFError` if there will not be so many."""
        # unlike a bytearray's, this memory is not filled with zeros first
        taken = np.empty(size, np.uint8).data
        have = 0
        while have < size:
            count = self.some(taken[have:])
            if not count:
                raise EOFError
            have += count
        return taken

    def until(self, mark: bytes, most: int, *, begin: bytes = b"") -> bytes:
        """Wait for all bytes up to and including a mark; see at once whether they begin as they should."""
        found = b""
        while not found.endswith(mark):
            if not (found.startswith(begin) or begin.startswith(found)):
                raise OSError(f"it said {found!r} where {begin!r} was expected")
            if len(found) == most:
                raise OSError(f"no end in its first {most} bytes")
            found += self.exactly(1)
        return found
