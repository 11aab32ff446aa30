"""What is to be computed: distinct sequences in blocks, each with its plan, and where the rows of each piece go."""

from __future__ import annotations

__all__ = ["Block", "Work", "count_residues"]

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import RESIDUES
from fedbio.encoder.packs import Plan, count_pieces, make_plan
from fedbio.encoder.source import Residues
from fedbio.results import EncoderInfo

BLOCK_PROTEINS = 65_536
BLOCK_RESIDUES = 32 * 2**20
"""A block ends when it has so many; sorting more proteins by length would not make packs fuller."""


@dataclass(frozen=True)
class Block:
    """A part of the work that is planned by itself.

    Parameters
    ----------
    first : int
        Number of its first sequence.
    sequences : Residues
        What `plan` speaks of.
    plan : Plan
    piece_rows : ndarray, shape (pieces + 1,), int64
        The rows of piece k, among those of all work, are those from ``piece_rows[k]`` to ``piece_rows[k + 1]``.
    """

    first: int
    sequences: Residues
    plan: Plan
    piece_rows: NDArray[np.int64]

    def packs(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield each pack: its number, its rows from and to, and how many residues the encoder sees."""
        seen = np.concatenate([[0], np.cumsum(self.plan.end - self.plan.begin)])[self.plan.packs]
        rows = self.piece_rows[self.plan.packs]
        for number in range(len(rows) - 1):
            yield number, int(rows[number]), int(rows[number + 1]), int(seen[number + 1] - seen[number])


class Work:
    """Distinct sequences, divided into blocks, cut into pieces and packed: a function of their lengths and `info`.

    Parameters
    ----------
    sequences : Residues
    info : EncoderInfo
        Says how long a piece may be, what becomes of longer proteins, and whether a piece has one row or several.
    budget : int
        The most tokens in a pack.

    Attributes
    ----------
    pieces : ndarray, shape (n,), int32
        Into how many pieces each sequence is cut.
    rows, residues : int
        How many rows there will be, and how many residues the encoder sees.
    """

    def __init__(self, sequences: Residues, info: EncoderInfo, *, budget: int) -> None:
        self.sequences, self.info, self.budget = sequences, info, budget
        self._windows = info.long == "window"
        lengths = sequences.lengths
        self.pieces = count_pieces(lengths, max_residues=info.max_residues, windows=self._windows).astype(np.int32)
        self.borders = _divide(lengths)
        rows = count_residues(lengths, info) if info.pooling == RESIDUES else self.pieces
        self._rows = self._at_borders(rows)
        self._seen = self._at_borders(np.where(lengths > info.max_residues, self.pieces * info.max_residues, lengths))
        self.rows, self.residues = int(self._rows[-1]), int(self._seen[-1])

    def _at_borders(self, counts: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many come before each border of blocks, shape (blocks + 1,)."""
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[self.borders]

    def name(self, digests: Iterable[NDArray[np.uint8]]) -> str:
        """Name the work by all that its rows and their order depend on, besides the encoder.

        Parameters
        ----------
        digests : iterable of ndarray, shape (m, 32), uint8
            SHA-256 of the sequences in order, in any division.
        """
        named = hashlib.sha256(b"blocks 2 %d %d %d " % (BLOCK_PROTEINS, BLOCK_RESIDUES, self.budget))
        for some in digests:
            named.update(some.tobytes())
        return named.hexdigest()

    def block_rows(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield each block: its number, its rows from and to, and how many residues the encoder sees."""
        for number in range(len(self.borders) - 1):
            first, last = int(self._rows[number]), int(self._rows[number + 1])
            yield number, first, last, int(self._seen[number + 1] - self._seen[number])

    def block(self, number: int) -> Block:
        """Plan one block."""
        first, last = self.borders[number], self.borders[number + 1]
        sequences = self.sequences[first:last]
        plan = make_plan(
            sequences.lengths, max_residues=self.info.max_residues, windows=self._windows, budget=self.budget
        )
        each = np.ones_like(plan.begin)
        if self.info.pooling == RESIDUES:
            each = plan.pool_end - plan.pool_begin
        return Block(first, sequences, plan, int(self._rows[number]) + np.concatenate([[0], np.cumsum(each)]))


def count_residues(lengths: NDArray[np.int32], info: EncoderInfo) -> NDArray[np.int64]:
    """Return how many residues of each protein are pooled: all, or the beginning of a protein that is cut."""
    counted = lengths.astype(np.int64)
    return counted if info.long == "window" else np.minimum(counted, info.max_residues)


def _divide(lengths: NDArray[np.int32]) -> list[int]:
    """Return the borders of blocks, each of `BLOCK_PROTEINS` or `BLOCK_RESIDUES` at most, or of one sequence."""
    ends = np.cumsum(lengths, dtype=np.int64)
    borders = [0]
    while (first := borders[-1]) < len(lengths):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + BLOCK_RESIDUES, side="right"))
        borders.append(max(min(last, first + BLOCK_PROTEINS), first + 1))
    return borders
