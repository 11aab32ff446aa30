"""Bytes through a socket, plain or encrypted, and a window on those that have arrived."""

from __future__ import annotations

__all__ = ["Pipe", "SocketPipe", "TlsPipe", "Window"]

import contextlib
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

PIECE_BYTES = 128 << 10
"""Bytes that are encrypted or read at once: they stay in the processor's cache, and the other end begins sooner."""

UNSENT_BYTES = 256 << 10
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
    """A socket as it is."""

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
        if not self._left:
            raise OSError(f"it sent more than {STRANGER_BYTES} bytes before it had proven who it is")
        self._hurry()
        count = self._socket.recv_into(into[: self._left])
        self._left -= count
        return count

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        if self._deadline is not None:
            self._hurry()
        sent = self._socket.sendmsg(buffers)
        for buffer in buffers:
            if sent < len(buffer):
                self._socket.sendall(memoryview(buffer)[sent:])
            sent = max(0, sent - len(buffer))

    def _hurry(self) -> None:
        left = (self._deadline or 0.0) - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)

    def trust(self) -> None:
        self._deadline = None
        self._socket.settimeout(None)

    def finish(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class TlsPipe(Pipe):
    """TLS over another pipe.

    OpenSSL allows one thread at a time in a connection, so it works on memory under a lock, and no thread holds
    the lock while it waits for the link. That is faster than its own reading and writing of sockets, too: those
    take two system calls for each 16 KiB.
    """

    def __init__(self, pipe: Pipe, context: ssl.SSLContext, host: str | None = None) -> None:
        self._pipe = pipe
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=host is None, server_hostname=host)
        self._lock = threading.Lock()
        self._arrived = memoryview(bytearray(PIECE_BYTES))

    def shake_hands(self) -> dict[str, Any] | None:
        """Prove both ends to each other and return the other's certificate."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fetch():
                    raise EOFError("no TLS there: it hung up") from None
            except ssl.SSLError:
                self._flush()  # tells the other end why
                raise
        self._flush()
        return self._tls.getpeercert()

    @property
    def alpn(self) -> str | None:
        """What the two ends have agreed to speak."""
        return self._tls.selected_alpn_protocol()

    def receive(self, into: memoryview) -> int:
        while True:
            count = 0
            with self._lock:
                try:
                    while count < len(into) and (more := self._tls.read(len(into) - count, into[count:])):
                        count += int(more)
                    return count
                except ssl.SSLWantReadError:
                    if count:
                        return count
            if not self._fetch():
                return 0

    def _fetch(self) -> int:
        count = self._pipe.receive(self._arrived)
        with self._lock:
            self._incoming.write(self._arrived[:count])
        return count

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                with self._lock:
                    view = view[self._tls.write(view[:PIECE_BYTES]) :]
                    full = self._outgoing.pending >= PIECE_BYTES
                if full:
                    self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            ready = self._outgoing.read()
        if ready:
            self._pipe.send([ready])

    def trust(self) -> None:
        self._pipe.trust()

    def finish(self) -> None:
        # without TLS's own end: frames say what is whole, and an end that is forged is one more broken connection
        self._pipe.finish()

    def cut(self) -> None:
        self._pipe.cut()

    def close(self) -> None:
        self._pipe.close()


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
