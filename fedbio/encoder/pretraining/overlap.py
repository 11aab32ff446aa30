"""Find sequences that are a part of others, or have one of them as a part: a domain or a chain is its protein, too."""

from __future__ import annotations

__all__ = ["WINDOW", "Overlap"]

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

WINDOW = 12
"""Residues by which places are looked up; 5 bits of each fill 60 of 64. Shorter sequences overlap with nothing."""


class Overlap:
    """Sequences, and who overlaps with them in whole.

    It takes 17 bytes of memory for each residue.

    Parameters
    ----------
    sequences : iterable of bytes
        In upper case.
    """

    def __init__(self, sequences: Iterable[bytes]) -> None:
        known = [sequence for sequence in sequences if len(sequence) >= WINDOW]
        self._text = b"\n".join(known)  # no part of two sequences is a part of one
        lengths = np.array([len(sequence) for sequence in known], dtype=np.int64)
        begins = np.cumsum(lengths + 1) - lengths - 1
        windows = _windows(self._text)
        self._places = np.argsort(windows, kind="stable")
        self._windows = windows[self._places]
        # a sequence that has one of these as a part has the window in that one's middle
        into = (lengths - WINDOW) // 2
        middles = windows[begins + into]
        order = np.argsort(middles, kind="stable")
        self._middles = middles[order]
        self._begins, self._lengths, self._into = begins[order], lengths[order], into[order]

    def holds(self, sequence: bytes) -> bool:
        """Whether a sequence is a part of one of these, or has one of them as a part; itself is both."""
        if len(sequence) < WINDOW or not len(self._windows):
            return False
        windows = _windows(sequence)
        return self._is_part(sequence, windows) or self._has_part(sequence, windows)

    def _is_part(self, sequence: bytes, windows: NDArray[np.uint64]) -> bool:
        into = len(windows) // 2
        first = int(np.searchsorted(self._windows, windows[into], side="left"))
        last = int(np.searchsorted(self._windows, windows[into], side="right"))
        return any(
            place >= into and self._text.startswith(sequence, place - into)
            for place in self._places[first:last].tolist()
        )

    def _has_part(self, sequence: bytes, windows: NDArray[np.uint64]) -> bool:
        first = np.searchsorted(self._middles, windows, side="left")
        last = np.searchsorted(self._middles, windows, side="right")
        for place in np.flatnonzero(last > first).tolist():
            for number in range(int(first[place]), int(last[place])):
                begin, length = int(self._begins[number]), int(self._lengths[number])
                start = place - int(self._into[number])
                if start >= 0 and sequence.startswith(self._text[begin : begin + length], start):
                    return True
        return False


def _windows(text: bytes) -> NDArray[np.uint64]:
    """Return a number for each window; two windows may have one number, so texts are compared besides."""
    letters = np.frombuffer(text, dtype=np.uint8) & 31
    count = max(0, len(letters) - WINDOW + 1)
    numbers = np.zeros(count, dtype=np.uint64)
    for first in range(WINDOW if count else 0):
        numbers <<= np.uint64(5)
        numbers |= letters[first : first + count]
    return numbers
