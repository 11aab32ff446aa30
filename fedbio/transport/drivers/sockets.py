"""What drivers over sockets share: one thread sends, strangers are bounded, and frames follow each other in a pipe."""

from __future__ import annotations

__all__ = ["Greeting", "SocketDriver"]

import contextlib
import logging
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from fedbio.errors import FedbioError, RefusedError
from fedbio.transport.credentials import Credentials, Identity, Unencrypted
from fedbio.transport.drivers.addresses import bind, connect, split
from fedbio.transport.drivers.base import Connection, ConnectionClosed, Driver, Lane, Listener
from fedbio.transport.drivers.outbox import Outbox
from fedbio.transport.drivers.pipes import SocketPipe, TlsPipe, Window
from fedbio.transport.drivers.tls import common_name, context, explain
from fedbio.transport.frames import HEADER_BYTES, Frame, assemble, encode, header, payload_bytes
from fedbio.transport.limits import Limits

log = logging.getLogger(__name__)

CLOSE_GRACE_S = 1.0
"""Seconds that frames already written have to leave when a connection or a listener closes."""

JOINED_BYTES = 32 << 10
"""Frames up to this size are copied into one buffer; for larger ones that would cost more than it saves."""


class Greeting(ABC):
    """What the two ends of one connection say before the first frame; each instance serves one connection."""

    alpn: str
    """Under which name TLS agrees on this greeting."""

    @abstractmethod
    def ask(self, window: Window, address: str, name: str) -> Window:
        """Ask to be let in; wait for the answer. `name` is empty where a certificate says it.

        Returns
        -------
        Window
            Where the frames will arrive.

        Raises
        ------
        ConnectionClosed
            With the other end's reason.
        """

    @abstractmethod
    def hear(self, window: Window) -> str:
        """Wait for the question and return the name in it."""

    @abstractmethod
    def answer(self, window: Window, refusal: str) -> Window:
        """Let the other end in, or tell it why not; return where its frames will arrive."""


class _SocketConnection(Connection):
    def __init__(
        self, peer: str, address: str, window: Window, on_end: Callable[[_SocketConnection], None] | None = None
    ) -> None:
        super().__init__(peer, address)
        self._window = window
        self._on_end = on_end
        self._outbox = Outbox()
        self._reading = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._send_all, name="fedbio-send", daemon=True).start()

    def _receive(self) -> list[Frame]:
        reason = "closed by the peer"
        with self._reading, contextlib.suppress(EOFError):
            try:
                head = self._window.exactly(HEADER_BYTES)
                size = payload_bytes(head, self.allowed_bytes)
                return [assemble(head, self._window.exactly(size))]
            except OSError as error:
                reason = f"the connection broke ({error.strerror or error})".lower()
        self._outbox.close(reason, drop=True)
        self._over.set()
        raise ConnectionClosed(self._outbox.reason)

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        if lane is not Lane.BULK or not self._outbox.claim():
            self._outbox.put(frame, lane)
            return
        try:
            self._window.pipe.send(_buffers([frame]))
        except OSError as error:
            self._break_off(error)
            raise ConnectionClosed(self._outbox.reason) from error
        finally:
            self._outbox.release()

    def _break_off(self, error: OSError) -> None:
        self._outbox.close(f"the connection broke ({error.strerror or error})".lower(), drop=True)
        self._window.pipe.cut()

    def _send_all(self) -> None:
        pipe = self._window.pipe
        try:
            while (frames := self._outbox.take()) is not None:
                pipe.send(_buffers(frames))
            pipe.finish()
            # the other end answers the end of our frames with the end of its own
            self._over.wait()
        except OSError as error:
            self._break_off(error)
        pipe.cut()
        with self._reading:
            pipe.close()
        if self._on_end:
            self._on_end(self)

    def close(self) -> None:
        self._outbox.close("closed here", drop=False)
        timer = threading.Timer(CLOSE_GRACE_S, self.abort)
        timer.daemon = True
        timer.start()

    def abort(self) -> None:
        self._outbox.close("closed here", drop=True)
        self._over.set()
        self._window.pipe.cut()


def _buffers(frames: Sequence[Frame]) -> list[bytes | memoryview]:
    if len(frames) > 1 or frames[0].size <= JOINED_BYTES:
        return [encode(frames)]
    return [header(frames[0]), frames[0].payload]


class _SocketListener(Listener):
    def __init__(
        self,
        take: Callable[[], tuple[list[socket.socket], str]],
        credentials: Identity,
        limits: Limits,
        greeting: type[Greeting],
    ) -> None:
        self._context: ssl.SSLContext | None = None
        if isinstance(credentials, Credentials):
            self._context = context(credentials, greeting.alpn, listening=True)
        self._sockets, self.address = take()
        self._limits = limits
        self._greeting = greeting
        self._lock = threading.Lock()
        self._closed = False
        self._strangers: dict[SocketPipe, None] = {}  # the oldest first
        self._connections: set[_SocketConnection] = set()
        self._places = limits.max_peers

    def start(self, on_connection: Callable[[Connection], None]) -> None:
        self._on_connection = on_connection
        for listening in self._sockets:
            threading.Thread(target=self._accept, args=(listening,), name="fedbio-accept", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            strangers, connections = list(self._strangers), list(self._connections)
        for listening in self._sockets:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes who accepts
            listening.close()
        for stranger in strangers:
            stranger.cut()
        for connection in connections:
            connection.close()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                accepted, place = listening.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warning("connection not accepted reason=%s", error)
                time.sleep(0.1)  # this process has too many files open: others will be closed
                continue
            try:
                pipe = self._pipe(accepted)
            except OSError:
                accepted.close()  # it has hung up already
                continue
            with self._lock:
                if self._closed:
                    pipe.close()
                    return
                if len(self._strangers) >= self._limits.max_handshakes:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    oldest.cut()
                self._strangers[pipe] = None
            shown = f"{place[0]}:{place[1]}" if place else "a local process"
            threading.Thread(target=self._meet, args=(pipe, shown), name="fedbio-meet", daemon=True).start()

    def _pipe(self, accepted: socket.socket) -> SocketPipe:
        deadline = time.monotonic() + self._limits.handshake_s
        if self._context:
            return TlsPipe(accepted, deadline, self._context)
        return SocketPipe(accepted, deadline)

    def _meet(self, stranger: SocketPipe, address: str) -> None:
        """Find out who it is and let it in, or not."""
        connection = None
        try:
            connection = self._let_in(stranger, address)
        except (OSError, EOFError, FedbioError) as error:
            log.info("connection refused address=%s reason=%s", address, error or "it hung up")
        finally:
            if not connection:
                stranger.dismiss()
                stranger.cut()
                stranger.close()
            with self._lock:
                self._strangers.pop(stranger, None)
        if connection:
            self._on_connection(connection)

    def _let_in(self, stranger: SocketPipe, address: str) -> _SocketConnection:
        certificate = stranger.shake_hands() if isinstance(stranger, TlsPipe) else None
        window, greeting = Window(stranger), self._greeting()
        claimed = greeting.hear(window)
        name = common_name(certificate) if self._context else Unencrypted(claimed).name
        with self._lock:
            refusal = "it is closing" if self._closed else "" if self._places else "it has as many peers as it may"
            self._places -= not refusal
        try:
            window = greeting.answer(window, refusal)
            if refusal:
                raise RefusedError(refusal)
        except BaseException:
            with self._lock:
                self._places += not refusal
            raise
        stranger.trust()
        connection = _SocketConnection(name, address, window, self._forget)
        with self._lock:
            self._connections.add(connection)
            closed = self._closed
        connection.start()
        if closed:
            connection.abort()
        return connection

    def _forget(self, connection: _SocketConnection) -> None:
        with self._lock:
            self._connections.discard(connection)
            self._places += 1


class SocketDriver(Driver):
    """A driver over sockets; what is said before the first frame makes the difference between them."""

    greeting: type[Greeting]

    def listen(self, address: str, credentials: Identity, limits: Limits) -> Listener:
        return _SocketListener(lambda: self._bind(address), credentials, limits, self.greeting)

    def dial(self, address: str, credentials: Identity, timeout_s: float) -> Connection:
        deadline = time.monotonic() + timeout_s
        pipe: SocketPipe | None = None
        try:
            name = ""
            if isinstance(credentials, Credentials):
                tls = context(credentials, self.greeting.alpn, listening=False)
                connected = self._connect(address, credentials, deadline)
                pipe = secure = TlsPipe(connected, deadline, tls, host=split(address)[0])
                secure.shake_hands()
                if secure.alpn != self.greeting.alpn:
                    raise ConnectionClosed(f"it does not speak {self.greeting.alpn}; has it another driver?")
            else:
                name = credentials.check()
                pipe = SocketPipe(self._connect(address, credentials, deadline), deadline)
            window = self.greeting().ask(Window(pipe), address, name)
            pipe.trust()
        except BaseException as error:
            if pipe:
                pipe.cut()
                pipe.close()
            if isinstance(error, OSError | EOFError):
                raise ConnectionClosed(explain(error, address, credentials)) from error
            raise
        connection = _SocketConnection("", address, window)
        connection.start()
        return connection

    def _bind(self, address: str) -> tuple[list[socket.socket], str]:
        sockets, port = bind(address)
        return sockets, f"{address.rpartition(':')[0]}:{port}"

    def _connect(self, address: str, credentials: Identity, deadline: float) -> socket.socket:
        return connect(*split(address), deadline)
