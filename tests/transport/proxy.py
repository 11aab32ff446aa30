"""A TCP proxy on loopback that does to a link what networks do: it cuts, stalls, throttles, and tampers with frames."""

from __future__ import annotations

__all__ = ["DOWN", "UP", "Proxy"]

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

from fedbio.transport.frames import HEADER_BYTES

UP, DOWN = "up", "down"
"""From the end that dials to the server, and back."""

PIECE_BYTES = 32 << 10

Tamper = Callable[[str, bytes], list[bytes]]


class Proxy:
    """Passes every connection on to `target`, and lets a test interfere.

    Parameters
    ----------
    target : str
        ``host:port`` of the server.
    tamper : callable, optional
        Given the direction and the bytes of one whole frame, returns what shall travel instead. For links on which
        frames can be told apart: the plain TCP driver's.

    Attributes
    ----------
    passed : dict of str to int
        Bytes taken from the sender, in each direction, over all connections.
    bytes_per_s : float or None
        How fast bytes pass in each direction of a connection.
    """

    def __init__(self, target: str, tamper: Tamper | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._tamper = tamper
        self.passed = {UP: 0, DOWN: 0}
        self.bytes_per_s: float | None = None
        self.connections = 0
        self.closed = False
        self._cuts: list[int] = []
        self._lock = threading.Lock()
        self._open: list[_Link] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._port = 0
        self.come_back()

    @property
    def address(self) -> str:
        """Where to dial."""
        return f"127.0.0.1:{self._port}"

    def go_away(self) -> None:
        """Cut what stands, and refuse to be dialled."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def come_back(self) -> None:
        """Listen again, at the same address."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # small buffers, so that what is throttled is felt by the sender
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        deadline = time.monotonic() + 5
        while True:
            try:
                listener.bind(("127.0.0.1", self._port))
                break
            except OSError:
                # the kernel lets go of a port a little after who has listened there
                assert time.monotonic() < deadline
                time.sleep(0.01)
        listener.listen(64)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._start(lambda: self._accept(listener))

    def cut(self) -> None:
        """End every connection that stands."""
        with self._lock:
            links, self._open = self._open, []
        for link in links:
            link.cut()

    def cut_at(self, totals: list[int]) -> None:
        """Cut each time that so many bytes have passed in all."""
        self._cuts = sorted(totals)

    @property
    def cuts_left(self) -> int:
        """How many of the cuts are still to come."""
        return len(self._cuts)

    def stall(self) -> None:
        """Keep the connections that stand open, and pass nothing on them any more; later ones are as usual."""
        with self._lock:
            links, self._open = self._open, []
        for link in links:
            link.stalled.set()

    def close(self) -> None:
        """End all."""
        self.closed = True
        self.go_away()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                dialled, _ = listener.accept()
            except OSError:
                return
            try:
                onward = socket.create_connection(self._target)
            except OSError:
                dialled.close()
                continue
            link = _Link(self, dialled, onward)
            with self._lock:
                self._open.append(link)
                self.connections += 1
            self._start(lambda link=link: link.pump(UP))  # type: ignore[misc]
            self._start(lambda link=link: link.pump(DOWN))  # type: ignore[misc]

    def count(self, direction: str, size: int) -> None:
        """Bytes were taken from their sender."""
        with self._lock:
            self.passed[direction] += size
            due = bool(self._cuts) and sum(self.passed.values()) >= self._cuts[0]
            if due:
                self._cuts.pop(0)
        if due:
            self.cut()


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, dialled: socket.socket, onward: socket.socket) -> None:
        self._proxy = proxy
        self._ends = {UP: (dialled, onward), DOWN: (onward, dialled)}
        for end in (dialled, onward):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.stalled = threading.Event()
        self._over = threading.Event()
        self._running = 2

    def cut(self) -> None:
        self._over.set()
        for end in self._ends[UP]:
            with contextlib.suppress(OSError):
                # as a reset: what is under way is lost
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def pump(self, direction: str) -> None:
        source, target = self._ends[direction]
        with contextlib.suppress(OSError):
            if self._proxy._tamper is None:
                self._pump_bytes(direction, source, target)
            else:
                self._pump_frames(direction, source, target, self._proxy._tamper)
            self._wait_while_stalled()  # nobody hears that the other end has closed either
            target.shutdown(socket.SHUT_WR)
        with self._proxy._lock:
            self._running -= 1
            last = not self._running
        if last:
            source.close()
            target.close()

    def _pump_bytes(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        while piece := source.recv(PIECE_BYTES):
            self._pass(direction, target, piece)

    def _pump_frames(self, direction: str, source: socket.socket, target: socket.socket, tamper: Tamper) -> None:
        with source.makefile("rb") as stream:
            self._pass(direction, target, stream.readline())  # the two ends' names
            while len(head := stream.read(HEADER_BYTES)) == HEADER_BYTES:
                (length,) = struct.unpack_from("<I", head, 16)
                for frame in tamper(direction, head + stream.read(length)):
                    self._pass(direction, target, frame)

    def _wait_while_stalled(self) -> None:
        while self.stalled.is_set() and not self._over.wait(0.05) and not self._proxy.closed:
            pass

    def _pass(self, direction: str, target: socket.socket, content: bytes) -> None:
        for begin in range(0, len(content), PIECE_BYTES):
            piece = content[begin : begin + PIECE_BYTES]
            rate = self._proxy.bytes_per_s
            if rate is not None:
                time.sleep(len(piece) / rate)
            self._wait_while_stalled()
            self._proxy.count(direction, len(piece))
            target.sendall(piece)
