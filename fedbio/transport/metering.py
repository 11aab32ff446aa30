"""Tell how far a payload has come, a few times a second."""

from __future__ import annotations

__all__ = ["Meter", "OnProgress", "Progress"]

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a payload has come."""

    peer: str
    topic: str
    outgoing: bool
    """Whether it leaves this end."""
    bytes: int
    """What has passed so far."""
    total: int | None
    """Bytes in all; None if they are not known yet."""
    seconds: float
    """Since its beginning."""
    skipped: int = 0
    """Bytes of these that the receiver had from earlier."""

    @property
    def rate(self) -> float:
        """Bytes per second since the beginning."""
        return (self.bytes - self.skipped) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at this rate; None if that cannot be told."""
        if self.total is None or not self.rate:
            return None
        return (self.total - self.bytes) / self.rate


OnProgress = Callable[[Progress], None]


class Meter:
    """Counts one payload's bytes."""

    def __init__(self, report: OnProgress | None, peer: str, topic: str, outgoing: bool, total: int | None) -> None:
        self._report = report
        self._about = (peer, topic, outgoing)
        self._total = total
        self._bytes = 0
        self._skipped = 0
        self._began = time.monotonic()
        self._due = self._began + INTERVAL_S

    def skip(self, size: int) -> None:
        """So many bytes are there from earlier."""
        self._bytes = self._skipped = size

    def add(self, size: int) -> None:
        """Count bytes, and report if it is time to."""
        self._bytes += size
        if self._report is not None and time.monotonic() >= self._due:
            self.report()

    def report(self) -> None:
        """Say how far it is."""
        if self._report is None:
            return
        now = time.monotonic()
        self._due = now + INTERVAL_S
        try:
            self._report(Progress(*self._about, self._bytes, self._total, now - self._began, self._skipped))
        except Exception:
            # a bar's bug must not take the transfer with it
            log.exception("a progress callback failed")
            self._report = None
