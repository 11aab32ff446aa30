"""A site: it dials the server, dials again after a break, and gives up after one total deadline."""

from __future__ import annotations

__all__ = ["SiteEndpoint"]

import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

from fedbio.errors import FedbioError, PeerUnreachable, ProtocolError
from fedbio.transport import drivers, handshake
from fedbio.transport.credentials import Identity
from fedbio.transport.drivers import Connection, ConnectionClosed
from fedbio.transport.endpoint import DEFAULTS, Endpoint, Presence
from fedbio.transport.limits import Limits
from fedbio.transport.metering import OnProgress
from fedbio.transport.outgoing import SendReceipt
from fedbio.transport.payloads import Payload
from fedbio.transport.receiver import Agreed, Received, SinkFactory
from fedbio.transport.session import Session

log = logging.getLogger(__name__)

BACK_OFF_S = (0.05, 2.0)
"""Seconds between two attempts to connect: at first, and at most."""


class SiteEndpoint(Endpoint):
    """A site: it dials the server, and dials again after a break.

    Parameters
    ----------
    address : str
        The server's ``host:port``.
    credentials : Credentials or Unencrypted
        The site's own; its name is the certificate's.
    spool : path-like
        A folder for payloads that are too large for memory.
    on_message : callable
        Called with each message that has arrived whole, on threads of the endpoint, several at a time.
    on_connection : callable
        Called with what has become of the server; one call at a time, in order, before its messages.
    sinks : mapping of str to callable, optional
        For a topic, what makes the sink of a message's payload; see `fedbio.transport.sinks`.
    schemes : callable, optional
        Given what is known of a message, returns the quantization schemes in which its model may come; all by default.
    on_progress : callable, optional
        Called a few times a second with how far a payload has come.
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
        credentials: Identity,
        *,
        spool: str | os.PathLike[str],
        on_message: Callable[[Received], None],
        on_connection: Callable[[Presence], None] = lambda presence: None,
        sinks: Mapping[str, SinkFactory] | None = None,
        on_progress: OnProgress | None = None,
        connect_deadline_s: float = 120.0,
        limits: Limits = DEFAULTS,
        heartbeat_s: float = 5.0,
        driver: str = "grpc",
        schemes: Agreed | None = None,
    ) -> None:
        super().__init__(credentials.check(), spool, on_message, sinks, on_progress, limits, heartbeat_s, schemes)
        self.address = address
        self._credentials = credentials
        self._on_connection = on_connection
        self._connect_deadline_s = connect_deadline_s
        self._driver = drivers.load(driver)
        self._changed = threading.Condition()
        self._current: Session | None = None
        self._server: bytes | None = None
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
        connection, welcome = self._connect()
        args = (connection, welcome)
        self._reader = threading.Thread(target=self._serve, args=args, name=f"{self.name}-read", daemon=True)
        self._enter(welcome)
        self._reader.start()
        self._start_heartbeat()
        return self

    def send(
        self, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> SendReceipt:
        """Send a message and wait until the server has acknowledged the whole, over several connections if need be.

        Raises
        ------
        PeerUnreachable
            If the server is not reached again, was started anew meanwhile, or takes longer than `timeout_s`.
        TransportError
            If the server does not accept the message; with its reason.
        """
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._current or self._ended, timeout_s)
            self._raise_failure()
            session = self._current
        if session is None:
            raise PeerUnreachable(f"server {self.address} is not connected; {topic} was not sent")
        left = None if timeout_s is None else timeout_s - (time.monotonic() - started)
        return session.send(topic, body, payload, left)

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
            session = self._current
            self._changed.notify_all()
        if session:
            session.close("the site is closing")
        if self._reader:
            self._reader.join(1.5)
        self._callbacks.close()

    @property
    def _ended(self) -> bool:
        return self._closing.is_set() or self._failure is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure

    def _sessions(self) -> list[Session]:
        with self._changed:
            return [self._current] if self._current else []

    def _expire(self, session: Session) -> None:
        """The server may still come back, and `_connect` has a deadline of its own."""

    def _set(self, session: Session | None, failure: FedbioError | None = None) -> None:
        with self._changed:
            self._current = session
            self._failure = failure
            if session is not None and self._closing.is_set():
                session.end("the site is closing")  # `close` has not seen it
            self._changed.notify_all()

    def _enter(self, welcome: handshake.Welcome) -> Session:
        """Return the session that a new connection carries: the one before, or a new one if the server forgot it."""
        session = self._current
        if session is not None and session.over is None and session.id == welcome.session:
            self._callbacks.submit(lambda: self._on_connection(Presence.BACK))
            return session
        if session is not None:
            session.end("the server was started anew" if self._server != welcome.instance else "the server gave it up")
            self._callbacks.submit(lambda: self._on_connection(Presence.GONE))
        session = self._session(f"server {self.address}")
        session.id = welcome.session
        self._server = welcome.instance
        self._announce(session, lambda: self._on_connection(Presence.ARRIVED))
        self._set(session)
        return session

    def _serve(self, connection: Connection, welcome: handshake.Welcome) -> None:
        """Read one connection after the other."""
        session = self._current
        assert session is not None
        while True:
            reason = session.carry(connection, welcome.window)
            presence = Presence.LOST
            if session.over is not None:
                presence = Presence.GONE
                self._set(None)
            self._callbacks.submit(functools.partial(self._on_connection, presence))
            if self._closing.is_set():
                return
            log.warning("server lost address=%s reason=%s", self.address, reason)
            # a server that lets us in and hangs up at once is not dialled without a pause
            self._closing.wait(BACK_OFF_S[0])
            try:
                connection, welcome = self._connect()
            except FedbioError as error:
                log.warning("given up: %s", error)
                session.end(str(error))
                self._set(None, error)
                self._callbacks.submit(lambda: self._on_connection(Presence.GONE))
                return
            session = self._enter(welcome)

    def _connect(self) -> tuple[Connection, handshake.Welcome]:
        """Try until the server lets us in, refuses, or the deadline has passed."""
        deadline = time.monotonic() + self._connect_deadline_s
        pause, most = BACK_OFF_S
        while not self._closing.is_set():
            try:
                connection = self._driver.dial(self.address, self._credentials, max(0.1, deadline - time.monotonic()))
                going_on = self._current.id if self._current and self._current.over is None else None
                welcome = handshake.greet(connection, self._limits, self._instance, going_on)
                if self._closing.is_set():
                    connection.abort()
                    break
                log.info("connected address=%s name=%s release=%s", self.address, welcome.name, welcome.release)
                return connection, welcome
            except (ConnectionClosed, ProtocolError) as error:
                cause = error
            if time.monotonic() + pause >= deadline:
                raise PeerUnreachable(
                    f"server {self.address} not reached within {self._connect_deadline_s:g} s (last: {cause}); "
                    "is the server up, and is the port open?"
                ) from cause
            if pause == BACK_OFF_S[0]:
                log.info("server not reached yet address=%s cause=%s", self.address, cause)
            self._closing.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, most)
        raise PeerUnreachable(f"server {self.address}: closed before it was reached")
