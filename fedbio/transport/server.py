"""The federation's server: it listens, lets sites in by their certificates, and reaches each by its name."""

from __future__ import annotations

__all__ = ["ServerEndpoint"]

import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from fedbio.errors import PeerUnreachable, ProtocolError, RefusedError
from fedbio.transport import drivers, handshake
from fedbio.transport.credentials import Credentials
from fedbio.transport.drivers import Connection, ConnectionClosed
from fedbio.transport.endpoint import DEFAULTS, Endpoint
from fedbio.transport.limits import Limits
from fedbio.transport.payloads import Payload
from fedbio.transport.streams import Received, SendReceipt, Streams

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True, eq=False)
class _Peer:
    streams: Streams
    hello: handshake.Hello


class ServerEndpoint(Endpoint):
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
        Called with a site's name and whether it is here now; one call at a time, in order, before its messages.
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
        log.debug("listening address=%s", self.address)
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
        self._callbacks.close()

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
                self._callbacks.submit(lambda: self._on_peer(connection.peer, False))

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
                    self._callbacks.submit(lambda: self._on_peer(name, False))
                self._announce(peer.streams, lambda: self._on_peer(name, True))
            if first:
                first.streams.abort("another connection has taken its place")
            return peer
