"""What the two kinds of endpoint share: workers, signs of life, and the streams of each connection."""

from __future__ import annotations

__all__ = ["DEFAULTS", "Endpoint"]

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from fedbio.transport.drivers import Connection
from fedbio.transport.limits import Limits
from fedbio.transport.streams import Received, Streams
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3
DEFAULTS = Limits()


class Endpoint:
    """A named end of connections."""

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
        )

    def _announce(self, streams: Streams, callback: Callable[[], None]) -> None:
        """Tell the owner that a peer is here, then let its messages through."""

        def announce() -> None:
            try:
                callback()
            finally:
                streams.announced.set()

        self._callbacks.submit(announce)

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
