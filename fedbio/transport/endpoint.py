"""Named ends of a federation's connections: a server that listens, and sites that dial out and dial again."""

from __future__ import annotations

__all__ = ["ServerEndpoint", "SiteEndpoint"]

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedbio.errors import FedbioError, PeerUnreachable, ProtocolError, RefusedError
from fedbio.transport import drivers, handshake
from fedbio.transport.credentials import Credentials
from fedbio.transport.drivers import Connection, ConnectionClosed
from fedbio.transport.limits import Limits
from fedbio.transport.payloads import Payload
from fedbio.transport.streams import Received, SendReceipt, Streams
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
MISSED_HEARTBEATS = 3
DEFAULTS = Limits()
BACK_OFF_S = (0.05, 2.0)
"""Seconds between two attempts to connect: at first, and at most."""


class _Endpoint:
    """What both kinds share: workers, heartbeats, callbacks in order."""

    def __init__(
        self,
        name: str,
        spool: str | os.PathLike[str],
        on_message: Callable[[Received], None],
        limits: Limits,
        heartbeat_s: float,
    ) -> None:
        self.name = name
        self._spool = Path(spool)
        self._on_message = on_message
        self._limits = limits
        self._heartbeat_s = heartbeat_s
        self._collectors = Workers(f"{name}-collect", most=limits.max_messages)
        self._handlers = Workers(f"{name}-handle", most=limits.max_messages)
        self._callbacks = Workers(f"{name}-callback", most=1)
        self._closing = threading.Event()

    def close(self) -> None:
        """End all connections within two seconds; may be called twice."""
        raise NotImplementedError

    def start(self) -> Self:
        """Begin; return the endpoint itself."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _streams(self, connection: Connection, peer: str, peer_window: int) -> Streams:
        return Streams(
            connection,
            peer=peer,
            peer_window=peer_window,
            limits=self._limits,
            spool=self._spool,
            deliver=self._on_message,
            collectors=self._collectors,
            handlers=self._handlers,
        )

    def _connected(self) -> list[Streams]:
        raise NotImplementedError

    def _start_heartbeat(self) -> None:
        threading.Thread(target=self._beat, name=f"{self.name}-heartbeat", daemon=True).start()

    def _beat(self) -> None:
        """Ask every peer for a sign of life, and drop one that has missed three in a row."""
        heard: dict[Streams, tuple[int, int]] = {}
        while not self._closing.wait(self._heartbeat_s):
            now = {}
            for streams in self._connected():
                before, missed = heard.get(streams, (-1, 0))
                missed = missed + 1 if streams.frames_heard == before else 0
                if missed >= MISSED_HEARTBEATS:
                    streams.abort(f"no sign of life for {missed * self._heartbeat_s:g} s")
                else:
                    streams.ping()
                    now[streams] = (streams.frames_heard, missed)
            heard = now

    def _close_workers(self) -> None:
        for workers in (self._collectors, self._handlers, self._callbacks):
            workers.close()


class ServerEndpoint(_Endpoint):
    """The federation's server: it listens, and knows each site by its certificate.

    Parameters
    ----------
    address : str
        ``host:port`` to listen on; port 0 takes a free one.
    credentials : Credentials
        The server's own, with the authority whose sites are let in.
    name : str
        Its name in log lines.
    spool : path-like
        A folder for payloads that are too large for memory.
    on_message : callable
        Called with each message that has arrived whole, on threads of the endpoint, several at a time.
    on_peer : callable
        Called with a site's name and whether it is here now; one call at a time, in order.
    limits : Limits
        What is accepted from a peer.
    heartbeat_s : float
        Seconds between two signs of life; a peer that misses three is dropped.

    Raises
    ------
    MachineError
        If the port is in use.
    RefusedError
        If the server's own certificate is expired, not yet valid, or of another authority.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        spool: str | os.PathLike[str],
        on_message: Callable[[Received], None],
        on_peer: Callable[[str, bool], None] = lambda name, here: None,
        name: str = "server",
        limits: Limits = DEFAULTS,
        heartbeat_s: float = 5.0,
        driver: str = "grpc",
    ) -> None:
        super().__init__(name, spool, on_message, limits, heartbeat_s)
        credentials.check()
        self._on_peer = on_peer
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._listener = drivers.load(driver).listen(address, credentials, limits)
        self.address = self._listener.address

    def start(self) -> Self:
        """Let sites in from now on."""
        self._listener.start(self._accept)
        self._start_heartbeat()
        log.info("listening address=%s", self.address)
        return self

    def peers(self) -> tuple[str, ...]:
        """Return the names of the sites that are connected, sorted."""
        with self._lock:
            return tuple(sorted(self._peers))

    def send(
        self, peer: str, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> SendReceipt:
        """Send a message and wait until the peer has acknowledged the whole.

        Raises
        ------
        PeerUnreachable
            If the peer is not connected, is lost on the way, or takes longer than `timeout_s`.
        TransportError
            If the peer does not accept the message; with its reason.
        """
        with self._lock:
            found = self._peers.get(peer)
        if found is None:
            raise PeerUnreachable(f"{peer} is not connected; {topic} was not sent")
        return found.streams.send(topic, body, payload, timeout_s)

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        for streams in self._connected():
            streams.close("the server is closing")
        self._listener.close()
        self._close_workers()

    def _connected(self) -> list[Streams]:
        with self._lock:
            return [peer.streams for peer in self._peers.values()]

    def _accept(self, connection: Connection) -> None:
        name = f"{self.name}-read-{connection.peer}"
        threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Carry one connection from its first frame to its last."""
        try:
            hello = handshake.listen_for(connection, self._limits)
            version = handshake.settle(hello)
            peer = self._admit(connection, hello)
            handshake.welcome(connection, version, self._limits)
        except ConnectionClosed as error:
            log.info("connection ended in its handshake peer=%s reason=%s", connection.peer, error)
            connection.abort()
            return
        except (ProtocolError, RefusedError) as error:
            log.warning("connection refused peer=%s reason=%s", connection.peer, error)
            handshake.refuse(connection, str(error))
            return
        log.info("site connected peer=%s address=%s", connection.peer, connection.address)
        reason = peer.streams.run()
        log.info("site gone peer=%s reason=%s", connection.peer, reason)
        with self._lock:
            if self._peers.get(connection.peer) is peer:
                del self._peers[connection.peer]
                self._tell(connection.peer, False)

    def _admit(self, connection: Connection, hello: handshake.Hello) -> _Peer:
        """Enter a connection under its certificate's name, unless another one lives under it."""
        name = connection.peer
        if not NAME.fullmatch(name):
            raise RefusedError(f"the certificate's name {name[:63]!r} is not one of a party (a-z, 0-9, hyphens)")
        peer = _Peer(self._streams(connection, name, hello.window), hello)
        while True:
            with self._lock:
                first = self._peers.get(name)
            if first and first.hello.instance != hello.instance and first.streams.shows_life(self._limits.takeover_s):
                raise RefusedError(
                    f"{name} is connected already, as process {first.hello.process} from "
                    f"{first.streams.connection.address}; stop that one first"
                )
            with self._lock:
                if self._peers.get(name) is not first:
                    continue  # someone else was faster
                self._peers[name] = peer
                if first:
                    self._tell(name, False)
                self._tell(name, True)
            if first:
                first.streams.abort("another connection has taken its place")
            return peer

    def _tell(self, name: str, here: bool) -> None:
        self._callbacks.submit(lambda: self._on_peer(name, here))


@dataclass(frozen=True, slots=True, eq=False)
class _Peer:
    streams: Streams
    hello: handshake.Hello


class SiteEndpoint(_Endpoint):
    """A site: it dials the server, and dials again after a break.

    Parameters
    ----------
    address : str
        The server's ``host:port``.
    credentials : Credentials
        The site's own; its name is the certificate's.
    spool : path-like
        A folder for payloads that are too large for memory.
    on_message : callable
        Called with each message that has arrived whole, on threads of the endpoint, several at a time.
    on_connection : callable
        Called with whether the server is connected now; one call at a time, in order.
    connect_deadline_s : float
        Seconds to keep trying to reach the server, at the start and after each break.
    limits : Limits
        What is accepted from the server.
    heartbeat_s : float
        Seconds between two signs of life; a server that misses three is dialled anew.

    Raises
    ------
    RefusedError
        If the site's own certificate is expired, not yet valid, of another authority, or not its key's.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        spool: str | os.PathLike[str],
        on_message: Callable[[Received], None],
        on_connection: Callable[[bool], None] = lambda here: None,
        connect_deadline_s: float = 60.0,
        limits: Limits = DEFAULTS,
        heartbeat_s: float = 5.0,
        driver: str = "grpc",
    ) -> None:
        super().__init__(credentials.check(), spool, on_message, limits, heartbeat_s)
        self.address = address
        self._credentials = credentials
        self._on_connection = on_connection
        self._connect_deadline_s = connect_deadline_s
        self._driver = drivers.load(driver)
        self._instance = os.urandom(16)
        self._changed = threading.Condition()
        self._current: Streams | None = None
        self._failure: FedbioError | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> Self:
        """Connect to the server.

        Raises
        ------
        PeerUnreachable
            If it is not reached within the deadline; with the last cause.
        RefusedError
            At once, if either end does not take the other's certificate, or the server refuses this site.
        """
        streams = self._connect()
        self._set(streams)
        self._reader = threading.Thread(target=self._serve, args=(streams,), name=f"{self.name}-read", daemon=True)
        self._reader.start()
        self._start_heartbeat()
        return self

    def send(
        self, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> SendReceipt:
        """Send a message to the server and wait until it has acknowledged the whole.

        Between two connections it waits for the next one.

        Raises
        ------
        PeerUnreachable
            If the server is lost on the way, not reached again, or takes longer than `timeout_s`.
        TransportError
            If the server does not accept the message; with its reason.
        """
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._current or self._ended, timeout_s)
            self._raise_failure()
            streams = self._current
        if streams is None:
            raise PeerUnreachable(f"server {self.address} is not connected; {topic} was not sent")
        left = None if timeout_s is None else timeout_s - (time.monotonic() - started)
        return streams.send(topic, body, payload, left)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the endpoint is closed and return whether it is.

        Raises
        ------
        PeerUnreachable, RefusedError
            If the server was lost and could not be reached again.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended, timeout_s)
            self._raise_failure()
            return self._closing.is_set()

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        with self._changed:
            streams = self._current
            self._changed.notify_all()
        if streams:
            streams.close("the site is closing")
        if self._reader:
            self._reader.join(1.5)
        self._close_workers()

    @property
    def _ended(self) -> bool:
        return self._closing.is_set() or self._failure is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure

    def _connected(self) -> list[Streams]:
        with self._changed:
            return [self._current] if self._current else []

    def _set(self, streams: Streams | None, failure: FedbioError | None = None) -> None:
        with self._changed:
            self._current = streams
            self._failure = failure
            self._changed.notify_all()

    def _serve(self, streams: Streams) -> None:
        """Read one connection after the other."""
        while True:
            self._callbacks.submit(lambda: self._on_connection(True))
            reason = streams.run()
            self._set(None)
            self._callbacks.submit(lambda: self._on_connection(False))
            if self._closing.is_set():
                return
            log.warning("server lost address=%s reason=%s", self.address, reason)
            try:
                streams = self._connect()
            except FedbioError as error:
                log.warning("given up: %s", error)
                self._set(None, error)
                return
            self._set(streams)

    def _connect(self) -> Streams:
        """Try until the server lets us in, refuses, or the deadline has passed."""
        deadline = time.monotonic() + self._connect_deadline_s
        pause, most = BACK_OFF_S
        while not self._closing.is_set():
            try:
                connection = self._driver.dial(self.address, self._credentials, max(0.1, deadline - time.monotonic()))
                welcome = handshake.greet(connection, self._limits, self._instance)
                log.info("connected address=%s name=%s release=%s", self.address, welcome.name, welcome.release)
                return self._streams(connection, f"server {self.address}", welcome.window)
            except (ConnectionClosed, ProtocolError) as error:
                cause = error
            if time.monotonic() + pause >= deadline:
                raise PeerUnreachable(
                    f"server {self.address} not reached within {self._connect_deadline_s:g} s (last: {cause}); "
                    "is the server up, and is the port open?"
                ) from cause
            if pause == BACK_OFF_S[0]:
                log.info("server not reached yet address=%s cause=%s", self.address, cause)
            self._closing.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 (spreads sites out, keeps no secret)
            pause = min(2 * pause, most)
        raise PeerUnreachable(f"server {self.address}: closed before it was reached")
