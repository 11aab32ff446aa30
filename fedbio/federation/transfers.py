"""Show how far large payloads have come, one bar or line for each that is under way."""

from __future__ import annotations

__all__ = ["Transfers"]

import threading
from types import TracebackType
from typing import Self, TextIO

from fedbio.progress import BYTES
from fedbio.progress import Progress as Line
from fedbio.transport import Progress

SHOWN_FROM_BYTES = 4 << 20
"""Smaller payloads are over before anyone has read their name."""


class Transfers:
    """What an endpoint calls a few times a second while payloads are under way, on whatever thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lines: dict[tuple[str, str, bool], Line] = {}
        self._lock = threading.Lock()

    def __call__(self, progress: Progress) -> None:
        key = (progress.peer, progress.topic, progress.outgoing)
        whole = progress.total is not None and progress.bytes >= progress.total
        with self._lock:
            line = self._lines.get(key)
            if line is not None and (progress.total != line.total or progress.bytes < line.done):
                # the one before was broken off, and another one has begun
                line.close(finished=False)
                del self._lines[key]
                line = None
            if line is None:
                if whole or (progress.total or progress.bytes) < SHOWN_FROM_BYTES:
                    return
                way = f"to {progress.peer}" if progress.outgoing else f"from {progress.peer}"
                label = f"{progress.topic} {way}"
                line = Line(label, total=progress.total, unit=BYTES, stream=self._stream, passing=True)
                self._lines[key] = line
            line.reach(progress.bytes)
            if whole:
                line.close()
                del self._lines[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            for line in self._lines.values():
                line.close(finished=False)
            self._lines.clear()
