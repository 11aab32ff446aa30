"""What the two kinds of endpoint share: sessions, signs of life, and callbacks."""

from __future__ import annotations

__all__ = ["DEFAULTS", "Endpoint", "Presence"]

import enum
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from fedbio.transport.limits import Limits
from fedbio.transport.metering import OnProgress
from fedbio.transport.receiver import Agreed, Received, Room, SinkFactory
from fedbio.transport.session import Session
from fedbio.transport.spool import sweep
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3
DEFAULTS = Limits()


class Presence(enum.Enum):
    """What has become of the other end."""

    ARRIVED = "arrived"
    """A process is here that was not here before."""
    LOST = "lost"
    """Its connection has ended; it may come back, and what is under way waits for it."""
    BACK = "back"
    """The same process is here again; what was under way goes on."""
    GONE = "gone"
    """It has closed, did not come back in time, or another process has taken its place: what was under way is lost."""


class Endpoint:
    """A named end of connections."""

    def __init__(
        self,
        name: str,
        spool: str | os.PathLike[str],
        on_message: Callable[[Received], None],
        sinks: Mapping[str, SinkFactory] | None,
        on_progress: OnProgress | None,
        limits: Limits,
        heartbeat_s: float,
        schemes: Agreed | None,
        room: Room | None = None,
    ) -> None:
        self.name = name
        self._spool = Path(spool)
        self._on_message = on_message
        self._sinks = dict(sinks or {})
        self._on_progress = on_progress
        self._limits = limits
        self._heartbeat_s = heartbeat_s
        self._schemes, self._room = schemes, room
        self._instance = os.urandom(16)
        self._callbacks = Workers(f"{name}-callback", most=1)
        self._closing = threading.Event()
        sweep(self._spool, limits.keep_partial_s)
        _keep_freed_memory()

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

    def _session(self, peer: str) -> Session:
        return Session(
            peer,
            limits=self._limits,
            spool=self._spool,
            sinks=self._sinks,
            deliver=self._on_message,
            on_progress=self._on_progress,
            schemes=self._schemes,
            room=self._room,
        )

    def _announce(self, session: Session, callback: Callable[[], None]) -> None:
        """Tell the owner that a peer is here, then let its messages through."""

        def announce() -> None:
            try:
                callback()
            finally:
                session.announced.set()

        self._callbacks.submit(announce)

    def _sessions(self) -> list[Session]:
        raise NotImplementedError

    def _expire(self, session: Session) -> None:
        """A session has waited for its peer as long as it may."""
        raise NotImplementedError

    def _start_heartbeat(self) -> None:
        threading.Thread(target=self._beat, name=f"{self.name}-heartbeat", daemon=True).start()

    def _beat(self) -> None:
        """Ask every peer for a sign of life, and drop the connection of one that has missed three in a row."""
        heard: dict[Session, tuple[int, int]] = {}
        while not self._closing.wait(self._heartbeat_s):
            now = {}
            for session in self._sessions():
                connection = session.connection
                if connection is None:
                    if time.monotonic() - session.detached_since > self._limits.resume_s:
                        self._expire(session)
                    continue
                before, missed = heard.get(session, (-1, 0))
                missed = missed + 1 if session.frames_heard == before else 0
                if missed >= MISSED_HEARTBEATS:
                    log.warning("no sign of life peer=%s seconds=%g", session.peer, missed * self._heartbeat_s)
                    connection.abort()
                else:
                    session.ping()
                    session.sweep()
                    now[session] = (session.frames_heard, missed)
            heard = now


def _keep_freed_memory() -> None:
    """Have the C library keep a few freed chunks: it adapts to the largest block that was given back.

    Without this the memory of each chunk that arrives goes back to the system and is taken, and cleared, anew: up to
    0.4 s of processor time per GB.
    """
    np.empty(8 << 20, np.uint8)
