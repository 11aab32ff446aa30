"""Show how far a long step has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

__all__ = ["Progress"]

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0
"""Seconds between two lines when standard error is not a terminal."""

BYTES = "bytes"
"""The unit that is shown in MB, with its rate."""


class Progress:
    """Count units of work towards a total, on standard error.

    Parameters
    ----------
    label : str
        What is being done, for example ``"site-1: embedding"``.
    total : int or None
        How many units there are; None if nobody knows yet.
    unit : str
        The unit's name, in the plural.
    passing : bool
        Leave nothing behind: the bar vanishes at the end, and what is done before its first line gets none.

    Examples
    --------
    >>> with Progress("reading", total=3, unit="proteins") as progress:
    ...     for _ in range(3):
    ...         progress.advance(1)
    """

    def __init__(
        self, label: str, *, total: int | None, unit: str, stream: TextIO | None = None, passing: bool = False
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._stream = stream or sys.stderr
        self._passing = passing
        self.done = 0
        self._started = self._last_line = time.monotonic()
        self._told: int | None = None
        """What was done at the last line."""
        self._bar = self._make_bar() if self._stream.isatty() else None

    def advance(self, units: int) -> None:
        """Add `units` to what is done."""
        self.done += units
        if self._bar is not None:
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def reach(self, done: int) -> None:
        """Say how much is done in all."""
        self.advance(done - self.done)

    def close(self, *, finished: bool = True) -> None:
        """Take the bar away, or write the last line if all is done."""
        if self._bar is not None:
            self._bar.close()
        elif finished and self._told != self.done and not (self._passing and self._told is None):
            self._line()

    def _make_bar(self) -> Any:
        unit = "B" if self.unit == BYTES else f" {self.unit}"
        scaled = self.unit == BYTES or (self.total or 0) > 100_000
        return tqdm(
            total=self.total, desc=self.label, unit=unit, unit_scale=scaled, file=self._stream, leave=not self._passing
        )

    def _line(self) -> None:
        self._last_line = time.monotonic()
        self._told = self.done
        elapsed = self._last_line - self._started
        done, rate, left = self._shown(self.done), "", ""
        if self.unit == BYTES and elapsed > 0:
            rate = f" at {self._shown(self.done / elapsed)}/s"
        if self.total is not None:
            share = self.done / self.total if self.total else 1.0
            done = f"{done} of {self._shown(self.total)} {self.unit if self.unit != BYTES else ''}".rstrip()
            done = f"{done} ({share:.0%})"
            left = f", about {elapsed * (1 - share) / share:.0f} s left" if 0 < share < 1 else ""
        elif self.unit != BYTES:
            done = f"{done} {self.unit}"
        print(f"{self.label}: {done} in {elapsed:.0f} s{rate}{left}", file=self._stream, flush=True)

    def _shown(self, count: float) -> str:
        return f"{count / 1e6:,.1f} MB" if self.unit == BYTES else f"{count:,}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)
