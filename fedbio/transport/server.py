"""The federation's server: it listens, lets sites in by their certificates, and reaches each by its name."""

from __future__ import annotations

__all__ = ["ServerEndpoint"]

import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

from fedbio.errors import PeerUnreachable, ProtocolError, RefusedError
from fedbio.transport import drivers, handshake
from fedbio.transport.credentials import Identity
from fedbio.transport.drivers import Connection, ConnectionClosed
from fedbio.transport.endpoint import DEFAULTS, Endpoint, Presence
from fedbio.transport.limits import Limits
from fedbio.transport.metering import OnProgress
from fedbio.transport.outgoing import SendReceipt
from fedbio.transport.payloads import Payload
from fedbio.transport.receiver import Agreed, Received, Room, SinkFactory
from fedbio.transport.session import Session

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True, eq=False)
class _Peer:
    session: Session
    hello: handshake.Hello
    carrying: threading.Lock = field(default_factory=threading.Lock)
    """Held while a connection carries the session: what is told of one comes before what is told of the next."""


class ServerEndpoint(Endpoint):
    """The federation's server: it listens, and knows each site by its certificate.

    Parameters
    ----------
    address : str
        ``host:port`` to listen on; port 0 takes a free one.
    credentials : Credentials or Unencrypted
        The server's own, with the authority whose sites are let in.
    name : str
        Its name in log lines.
    spool : path-like
        A folder for payloads that are too large for memory.
    on_message : callable
        Called with each message that has arrived whole, on threads of the endpoint, several at a time.
    on_peer : callable
        Called with a site's name and what has become of it; one call at a time, in order, before its messages.
    sinks : mapping of str to callable, optional
        For a topic, what makes the sink of a message's payload; see `fedbio.transport.sinks`.
    many : collection of str
        Names under which several processes may be here at once; each is a peer of its own, ``NAME:ID``.
    schemes : callable, optional
        Given what is known of a message, returns the quantization schemes in which its model may come; all by default.
    room : callable, optional
        Given what is known of a message without a sink of its own, returns how many bytes its payload may have, as it
        travels and as it is kept; by default as many as `limits` says.
    on_progress : callable, optional
        Called a few times a second with how far a payload has come.
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
        credentials: Identity,
        *,
        spool: str | os.PathLike[str],
        on_message: Callable[[Received], None],
        on_peer: Callable[[str, Presence], None] = lambda name, presence: None,
        sinks: Mapping[str, SinkFactory] | None = None,
        on_progress: OnProgress | None = None,
        name: str = "server",
        limits: Limits = DEFAULTS,
        heartbeat_s: float = 5.0,
        driver: str = "grpc",
        schemes: Agreed | None = None,
        room: Room | None = None,
        many: Collection[str] = (),
    ) -> None:
        super().__init__(name, spool, on_message, sinks, on_progress, limits, heartbeat_s, schemes, room)
        credentials.check()
        self._on_peer = on_peer
        self._many = frozenset(many)
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
            return tuple(sorted(name for name, peer in self._peers.items() if peer.session.connection is not None))

    def send(
        self, peer: str, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> SendReceipt:
        """Send a message and wait until the peer has acknowledged the whole, over several connections if need be.

        Raises
        ------
        PeerUnreachable
            If the peer is not here, does not come back within `Limits.resume_s`, or takes longer than `timeout_s`.
        TransportError
            If the peer does not accept the message; with its reason.
        """
        with self._lock:
            found = self._peers.get(peer)
        if found is None:
            if payload is not None:
                payload.forgo()
            raise PeerUnreachable(f"{peer} is not connected; {topic} was not sent")
        return found.session.send(topic, body, payload, timeout_s)

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        for session in self._sessions():
            session.close("the server is closing")
        self._listener.close()
        self._callbacks.close()

    def _sessions(self) -> list[Session]:
        with self._lock:
            return [peer.session for peer in self._peers.values()]

    def _accept(self, connection: Connection) -> None:
        name = f"{self.name}-read-{connection.peer}"
        threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Carry one connection from its first frame to its last."""
        try:
            hello = handshake.listen_for(connection, self._limits)
            version = handshake.settle(hello)
            peer, resumed = self._admit(connection, hello)
            handshake.welcome(connection, version, self._limits, self._instance, peer.session.id)
        except ConnectionClosed as error:
            log.info("connection ended in its handshake peer=%s reason=%s", connection.peer, error)
            connection.abort()
            return
        except (ProtocolError, RefusedError) as error:
            log.warning("connection refused peer=%s reason=%s", connection.peer, error)
            handshake.refuse(connection, str(error))
            return
        if (before := peer.session.connection) is not None:
            before.abort()  # the site has left it, though it may look whole from here
        with peer.carrying:
            presence = Presence.BACK if resumed else Presence.ARRIVED
            log.info("site %s peer=%s address=%s", presence.value, connection.peer, connection.address)
            self._tell(peer.session.peer, peer, presence)
            reason = peer.session.carry(connection, hello.window)
            presence = Presence.LOST if peer.session.over is None else Presence.GONE
            log.info("site %s peer=%s reason=%s", presence.value, connection.peer, reason)
            self._tell(peer.session.peer, peer, presence)

    def _admit(self, connection: Connection, hello: handshake.Hello) -> tuple[_Peer, bool]:
        """Enter a connection under its certificate's name, unless another process lives under it.

        Returns
        -------
        peer : _Peer
        resumed : bool
            Whether its session goes on.
        """
        name = connection.peer
        if not NAME.fullmatch(name):
            raise RefusedError(f"the certificate's name {name[:63]!r} is not one of a party (a-z, 0-9, hyphens)")
        if name in self._many:
            # no name of a certificate has a colon in it
            name = f"{name}:{hello.instance.hex()}"
        while True:
            with self._lock:
                first = self._peers.get(name)
            same = first is not None and first.hello.instance == hello.instance
            if first is not None and same and hello.session == first.session.id and first.session.over is None:
                return first, True
            if first is not None and not same and first.session.shows_life(self._limits.takeover_s):
                at = first.session.connection
                raise RefusedError(
                    f"{name} is connected already, as process {first.hello.process} from "
                    f"{at.address if at else 'elsewhere'}; stop that one first"
                )
            peer = _Peer(self._session(name), hello)
            with self._lock:
                if self._peers.get(name) is not first:
                    continue  # someone else was faster
                self._peers[name] = peer
                if first is not None:
                    self._callbacks.submit(lambda: self._on_peer(name, Presence.GONE))
            if first is not None:
                first.session.end("another process has taken its place")
                if first.session.connection is not None:
                    first.session.connection.abort()
            return peer, False

    def _tell(self, name: str, peer: _Peer, presence: Presence) -> None:
        """Tell the owner what has become of a site, unless another process has taken its place."""
        with self._lock:
            if self._peers.get(name) is peer:
                if presence is Presence.GONE:
                    del self._peers[name]
                self._announce(peer.session, lambda: self._on_peer(name, presence))

    def _expire(self, session: Session) -> None:
        with self._lock:
            found = [(name, peer) for name, peer in self._peers.items() if peer.session is session]
        for name, peer in found:
            session.end(f"not back within {self._limits.resume_s:g} s")
            log.info("site gone peer=%s reason=%s", name, session.over)
            self._tell(name, peer, Presence.GONE)
