"""Make, sum and hash the chunks of one payload once, however many peers it is sent to."""

from __future__ import annotations

__all__ = ["Chunk", "SharedChunks"]

import collections
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from blake3 import blake3
from isal.isal_zlib import crc32

KEPT_CHUNKS = 16
"""Chunks kept for readers who come a little later."""

PATIENCE_S = 1.0
"""Seconds that the others wait for a slow reader, all in all, before it has to read for itself..."""

PATIENCE_SHARE = 0.1
"""... and this share of the time since the first chunk: readers that are equally fast wait for each other a little."""


class Chunk(NamedTuple):
    """A piece of a payload and its CRC32."""

    view: memoryview
    crc: int


class SharedChunks:
    """Chunks that several threads read, each at its own place; whoever is first makes the next one.

    Parameters
    ----------
    source : iterator of memoryview
        Makes the chunks.
    expected : int
        Readers that every chunk is kept for, however slow they are; 0 if a slow one can read again for itself.
    """

    def __init__(self, source: Iterator[memoryview], expected: int = 0) -> None:
        self._source = source
        self._again = expected == 0
        self._expected = expected
        self._began = time.monotonic()
        self._waited = 0.0
        self._hasher = blake3()
        self._kept: collections.deque[Chunk] = collections.deque()
        self._first = 0
        """Number of the oldest chunk that is kept."""
        self._places: dict[int, int] = {}
        """Where each reader is."""
        self._known = 0
        self._making = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self.digest: bytes | None = None
        """BLAKE3 of the whole, once the last chunk was made."""

    def join(self) -> int | None:
        """Return a number for a new reader, or None if the beginning is not kept any more, or making it has failed."""
        with self._changed:
            if self._first > 0 or self._failure is not None:
                return None
            self._known += 1
            self._places[self._known] = 0
            return self._known

    def leave(self, reader: int) -> None:
        """A reader has enough."""
        with self._changed:
            self._places.pop(reader, None)
            self._expected -= 1
            self._changed.notify_all()

    def get(self, reader: int) -> Chunk | None:
        """Return a reader's next chunk, None at the end.

        Raises
        ------
        LookupError
            If the reader was so slow that the others have gone on.
        """
        with self._changed:
            while True:
                place = self._places.get(reader)
                if place is None:
                    raise LookupError
                if place - self._first < len(self._kept):
                    self._places[reader] = place + 1
                    self._changed.notify_all()
                    return self._kept[place - self._first]
                if self._failure is not None:
                    raise self._failure
                if self.digest is not None:
                    return None
                if not self._making:
                    self._making = True
                    break
                self._changed.wait()
        return self._make(reader)

    def _make(self, reader: int) -> Chunk | None:
        """Make the next chunk, on the thread of the reader who needs it first."""
        chunk = None
        try:
            view = next(self._source, None)
            if view is None:
                digest = self._hasher.digest()
            else:
                # the sum first: it reads in order, and so brings the chunk into the cache for the hash
                chunk = Chunk(view, crc32(view))
                self._hasher.update(view)
        except BaseException as error:
            with self._changed:
                self._failure, self._making = error, False
                self._changed.notify_all()
            raise
        with self._changed:
            if chunk is None:
                self.digest = digest
            else:
                self._make_room()
                self._kept.append(chunk)
                self._places[reader] += 1
            self._making = False
            self._changed.notify_all()
        return chunk

    def _make_room(self) -> None:
        while len(self._kept) >= KEPT_CHUNKS:
            slow = [reader for reader, place in self._places.items() if place <= self._first]
            if not slow and len(self._places) >= self._expected:
                self._kept.popleft()
                self._first += 1
            elif not self._again:
                self._changed.wait()
            elif not self._wait_a_little():
                for reader in slow:
                    del self._places[reader]
                self._waited = 0.0

    def _wait_a_little(self) -> bool:
        """Wait for the slow ones, and return whether to go on waiting."""
        started = time.monotonic()
        left = PATIENCE_S + PATIENCE_SHARE * (started - self._began) - self._waited
        moved = left > 0 and self._changed.wait(left)
        self._waited += time.monotonic() - started
        return moved
