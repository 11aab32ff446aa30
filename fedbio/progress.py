"""Show how far a long step has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

__all__ = ["Progress"]

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0
"""Seconds between two lines when standard error is not a terminal."""


class Progress:
    """Count units of work towards a total, on standard error.

    Parameters
    ----------
    label : str
        What is being done, for example ``"site-1: embedding"``.
    total : int
        How many units there are.
    unit : str
        The unit's name, in the plural.

    Examples
    --------
    >>> with Progress("reading", total=3, unit="proteins") as progress:
    ...     for _ in range(3):
    ...         progress.advance(1)
    """

    def __init__(self, label: str, *, total: int, unit: str, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._stream = stream or sys.stderr
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=label, unit=f" {unit}", unit_scale=total > 100_000, file=self._stream)
            if self._stream.isatty()
            else None
        )

    def advance(self, units: int) -> None:
        """Add `units` to what is done."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        share = self._done / self.total if self.total else 1.0
        left = f", about {elapsed * (1 - share) / share:.0f} s left" if 0 < share < 1 else ""
        print(
            f"{self.label}: {self._done:,} of {self.total:,} {self.unit} ({share:.0%}) in {elapsed:.0f} s{left}",
            file=self._stream,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()
