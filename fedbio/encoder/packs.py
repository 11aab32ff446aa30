"""Plan the work: cut proteins into pieces that the encoder takes, and pieces of like length into packs.

The plan is a function of the proteins and the budget alone, never of the machine's speed or of where a run was
broken off, so the same call gives the same bytes whenever it is repeated.
"""

from __future__ import annotations

__all__ = ["ENDS", "Plan", "count_pieces", "make_plan"]

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENDS = 2
"""Tokens that stand around a piece: start and end."""

Integers = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Pieces of proteins in the order in which they are computed.

    Parameters
    ----------
    protein : ndarray, shape (pieces,), int64
        Which protein a piece is from.
    begin, end : ndarray, shape (pieces,), int64
        The residues that the encoder sees.
    pool_begin, pool_end : ndarray, shape (pieces,), int64
        The residues among them that count: with windows, each residue of a protein counts in one piece only.
    counted : ndarray, shape (pieces,), int64
        How many residues of its protein count, in this piece and in others.
    packs : ndarray, shape (packs + 1,), int64
        Pack k holds the pieces from ``packs[k]`` to ``packs[k + 1]``.
    """

    protein: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    pool_begin: NDArray[np.int64]
    pool_end: NDArray[np.int64]
    counted: NDArray[np.int64]
    packs: NDArray[np.int64]

    @property
    def residues(self) -> int:
        """How many residues the encoder sees in all."""
        return int((self.end - self.begin).sum())


def make_plan(lengths: Sequence[int] | Integers, *, max_residues: int, windows: bool, budget: int) -> Plan:
    """Plan how to embed proteins of given lengths.

    Parameters
    ----------
    lengths : sequence of int, or ndarray, shape (n,)
        Residues of each protein, all at least 1.
    max_residues : int
        The longest piece that the encoder takes.
    windows : bool
        Cover a longer protein by overlapping windows; otherwise only its first `max_residues` residues are used.
    budget : int
        The most tokens in a pack; a piece that is longer is a pack of its own.

    Notes
    -----
    Windows overlap by at least a quarter and are spread evenly; the border between the residues that count in one
    and in the next lies in the middle of their overlap. So each residue counts in the window in which it is farthest
    from a cut.
    """
    whole = np.asarray(lengths, dtype=np.int64)
    long = np.flatnonzero(whole > max_residues) if windows else np.empty(0, dtype=np.int64)
    short = np.setdiff1d(np.arange(len(whole)), long, assume_unique=True)
    pieces = np.zeros((6, len(short)), dtype=np.int64)  # protein, begin, end, pool_begin, pool_end, counted
    pieces[0] = short
    pieces[2] = pieces[4] = pieces[5] = np.minimum(whole[short], max_residues)
    cut = [
        (protein, *window, int(whole[protein]))
        for protein in long.tolist()
        for window in _windows(int(whole[protein]), max_residues)
    ]
    if cut:
        pieces = np.concatenate([pieces, np.array(cut, dtype=np.int64).T], axis=1)
        pieces = pieces[:, np.argsort(pieces[0], kind="stable")]
    # longest first: what needs most memory is met at once; stable, so that equal lengths keep the input's order
    pieces = pieces[:, np.argsort(pieces[1] - pieces[2], kind="stable")]
    packs = [0]
    tokens = 0
    for place, length in enumerate((pieces[2] - pieces[1] + ENDS).tolist()):
        if tokens and tokens + length > budget:
            packs.append(place)
            tokens = 0
        tokens += length
    if pieces.shape[1]:
        packs.append(pieces.shape[1])
    protein, begin, end, pool_begin, pool_end, counted = pieces
    return Plan(protein, begin, end, pool_begin, pool_end, counted, np.array(packs, dtype=np.int64))


def count_pieces(lengths: Integers, *, max_residues: int, windows: bool) -> NDArray[np.int64]:
    """Return into how many pieces `make_plan` cuts each protein, shape (n,)."""
    if not windows:
        return np.ones(len(lengths), dtype=np.int64)
    overlap = max_residues // 4
    needed = -(-(lengths.astype(np.int64) - overlap) // (max_residues - overlap))
    return np.where(lengths > max_residues, needed, 1)


def _windows(length: int, size: int) -> list[tuple[int, int, int, int]]:
    overlap = size // 4
    count = -(-(length - overlap) // (size - overlap))
    begins = [round(k * (length - size) / (count - 1)) for k in range(count)]
    borders = [0, *((left + size + right) // 2 for left, right in itertools.pairwise(begins)), length]
    counted = itertools.pairwise(borders)
    return [(begin, begin + size, first, last) for begin, (first, last) in zip(begins, counted, strict=True)]
