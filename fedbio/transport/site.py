"""A site: it dials the server, dials again after a break, and gives up after one total deadline."""

from __future__ import annotations

__all__ = ["SiteEndpoint"]

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Self

from fedbio.errors import FedbioError, PeerUnreachable, ProtocolError
from fedbio.transport import drivers, handshake
from fedbio.transport.credentials import Credentials
from fedbio.transport.drivers import ConnectionClosed
from fedbio.transport.endpoint import DEFAULTS, Endpoint
from fedbio.transport.limits import Limits
from fedbio.transport.payloads import Payload
from fedbio.transport.streams import Received, SendReceipt, Streams

log = logging.getLogger(__name__)

BACK_OFF_S = (0.05, 2.0)
"""Seconds between two attempts to connect: at first, and at most."""


class SiteEndpoint(Endpoint):
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
        Called with whether the server is connected now; one call at a time, in order, before its messages.
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
        self._callbacks.close()

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
            self._announce(streams, lambda: self._on_connection(True))
            reason = streams.run()
            self._set(None)
            self._callbacks.submit(lambda: self._on_connection(False))
            if self._closing.is_set():
                return
            log.warning("server lost address=%s reason=%s", self.address, reason)
            # a server that lets us in and hangs up at once is not dialled without a pause
            self._closing.wait(BACK_OFF_S[0])
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
                if self._closing.is_set():
                    connection.abort()
                    break
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
            self._closing.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, most)
        raise PeerUnreachable(f"server {self.address}: closed before it was reached")
