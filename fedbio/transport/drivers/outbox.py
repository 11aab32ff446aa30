"""Queue frames on their way out, so that a small one never waits behind a large model."""

from __future__ import annotations

__all__ = ["Outbox"]

import collections
import threading

from fedbio.transport.drivers.base import ConnectionClosed, Lane, Source
from fedbio.transport.frames import Frame

BULK_FRAMES = 2
"""Bulk frames queued at most: one on the link, one ready; more would only take memory."""

URGENT_FRAMES = 1024
"""Urgent frames queued at most: a peer that reads none of so many is as good as gone."""

JOINED_BYTES = 64 << 10
"""Urgent frames leave together up to this size."""

LINGER_S = 0.0005
"""Seconds that a lazy frame waits for another one to leave with."""


class Outbox:
    """Urgent frames leave first and together, lazy ones with the next, bulk frames and sources of them take turns."""

    def __init__(self) -> None:
        self._urgent: collections.deque[Frame] = collections.deque()
        self._bulk: collections.deque[Frame] = collections.deque()
        self._sources: collections.deque[Source] = collections.deque()
        self._bulk_is_next = True
        """Whether it is the turn of the queue and not of the sources, where there are both."""
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._drained = threading.Condition(self._lock)
        self._hurry = False
        self._sending = False
        """Whether someone is sending frames right now: who has taken them, or who has claimed it."""
        self._taken = False
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why no more frames are taken; None while they are."""
        return self._reason

    def put(self, frame: Frame, lane: Lane) -> None:
        """Queue a frame; a bulk one waits while the bulk lane is full."""
        bulk = lane is Lane.BULK
        with self._lock:
            while bulk and len(self._bulk) >= BULK_FRAMES and self._reason is None:
                self._drained.wait()
            if self._reason is None and len(self._urgent) >= URGENT_FRAMES:
                self._close(f"it took none of {URGENT_FRAMES} frames", drop=True)
            if self._reason is not None:
                raise ConnectionClosed(self._reason)
            (self._bulk if bulk else self._urgent).append(frame)
            self._hurry = self._hurry or lane is not Lane.LAZY
            self._filled.notify()

    def offer(self, source: Source) -> None:
        """Ask a source for frames, in turn with the others, until it gives None."""
        with self._lock:
            if self._reason is not None:
                raise ConnectionClosed(self._reason)
            self._sources.append(source)
            self._hurry = True
            self._filled.notify()

    def claim(self) -> bool:
        """Return whether the caller may send a frame by itself, past an empty queue; it must `release` then.

        That saves a long frame the way to another thread, whose processor does not have it in its cache.
        """
        with self._lock:
            if self._reason is not None:
                raise ConnectionClosed(self._reason)
            free = not (self._sending or self._urgent or self._bulk)
            self._sending = self._sending or free
            return free

    def release(self) -> None:
        """The frame is out."""
        with self._lock:
            self._sending = False
            if self._urgent or self._bulk or self._reason is not None:
                self._filled.notify()

    def take(self) -> list[Frame] | None:
        """Wait for the next frames to send together; None after `close`, once all that was queued is out.

        Small frames that are ready together leave together: a message costs the link far more than its bytes do.
        """
        while True:
            taken = self._take()
            if not callable(taken):
                return taken
            frame = taken()
            if frame is not None:
                with self._lock:
                    self._sources.append(taken)
                return [frame]

    def _take(self) -> list[Frame] | Source | None:
        with self._lock:
            if self._taken:
                self._sending = self._taken = False
            self._wait_for_frames()
            if not self._hurry and self._reason is None:
                self._filled.wait(LINGER_S)
                self._wait_for_frames()  # those that were there may have been dropped
            if not (self._urgent or self._bulk or self._sources):
                return None
            self._sending = self._taken = True
            self._hurry = bool(self._bulk or self._sources)
            if self._urgent:
                return self._join_urgent()
            self._bulk_is_next = not self._bulk_is_next
            if self._sources and (self._bulk_is_next or not self._bulk):
                return self._sources.popleft()
            frame = self._bulk.popleft()
            self._drained.notify()
            self._hurry = bool(self._bulk or self._sources)
            return [frame]

    def _wait_for_frames(self) -> None:
        while self._sending or not (self._urgent or self._bulk or self._sources or self._reason is not None):
            self._filled.wait()

    def _join_urgent(self) -> list[Frame]:
        joined = [self._urgent.popleft()]
        size = joined[0].size
        while self._urgent and (size := size + self._urgent[0].size) <= JOINED_BYTES:
            joined.append(self._urgent.popleft())
        self._hurry = self._hurry or bool(self._urgent)
        return joined

    def close(self, reason: str, *, drop: bool) -> None:
        """Take no more frames; keep those queued unless told to drop them."""
        with self._lock:
            self._close(reason, drop=drop)

    def _close(self, reason: str, *, drop: bool) -> None:
        self._reason = self._reason or reason
        if drop:
            self._urgent.clear()
            self._bulk.clear()
            self._sources.clear()
        self._filled.notify_all()
        self._drained.notify_all()
