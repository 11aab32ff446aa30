"""Say which residues the pooling ``ends`` averages beside all: bins counted from both ends, where sorting signals sit.

A signal or transit peptide is the beginning of a protein, a retention or peroxisome signal its last residues; in an
average over hundreds of residues either is lost. (DeepLoc finds them by attention over residues: Almagro Armenteros et
al., *Bioinformatics* 33, 3387, 2017.)
"""

from __future__ import annotations

__all__ = ["BINS", "END_BINS", "START_BINS", "average_bins", "bins_name", "find_bins", "piece_bins"]

import numpy as np
from numpy.typing import NDArray

from fedbio.encoder.packs import Plan

START_BINS = (20, 40)
"""Residues of the bins from the first residue on, one after the other."""
END_BINS = (10, 30)
"""Residues of the bins from the last residue backwards. Bins of one end share no residue; those of both ends do in
proteins shorter than all of them together."""
BINS = len(START_BINS) + len(END_BINS)

Integers = NDArray[np.int64]


def bins_name() -> str:
    """Describe the bins, as `fedbio.results.EncoderInfo` has it: ``"start 20 40, end 10 30"``."""
    return f"start {' '.join(map(str, START_BINS))}, end {' '.join(map(str, END_BINS))}"


def find_bins(counted: Integers) -> tuple[Integers, Integers]:
    """Find the bins of proteins, in the order in which a row has them.

    Parameters
    ----------
    counted : ndarray, shape (n,), int64
        Residues of each protein that are pooled.

    Returns
    -------
    first, last : ndarray, shape (n, BINS), int64
        Bin k of a protein holds the residues from ``first[k]`` to ``last[k]``, counted from 0; too short a protein
        leaves it a part of them, or none.
    """
    whole = counted[:, None]
    start, end = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (START_BINS, END_BINS))
    first = np.concatenate([np.minimum(start[:-1], whole), np.maximum(whole - end[1:], 0)], axis=1)
    last = np.concatenate([np.minimum(start[1:], whole), np.maximum(whole - end[:-1], 0)], axis=1)
    return first, last


def piece_bins(plan: Plan, first: int, last: int) -> tuple[Integers, Integers]:
    """Find what the pieces from `first` to `last` of a plan have of their proteins' bins.

    Returns
    -------
    first, last : ndarray, shape (pieces, BINS), int64
        Residues as the encoder sees them, counted from 0 at the piece's first; equal where the piece has none.
    """
    here = slice(first, last)
    begin, lowest, highest = (each[here, None] for each in (plan.begin, plan.pool_begin, plan.pool_end))
    # of a bin that spans two pieces, each has the residues that count in it
    starts, stops = (np.clip(each, lowest, highest) - begin for each in find_bins(plan.counted[here]))
    return starts, stops


def average_bins(sums: NDArray[np.float32], counted: Integers) -> NDArray[np.float32]:
    """Turn the sums over all residues and over the bins into averages.

    Parameters
    ----------
    sums : ndarray, shape (n, (1 + BINS) * D), float32
    counted : ndarray, shape (n,), int64
        Residues of each protein that are pooled, at least 1.

    Returns
    -------
    ndarray, shape (n, (1 + BINS) * D), float32

    Notes
    -----
    A bin without residues takes the average over all, so that no row has zeros that no protein has.
    """
    first, last = find_bins(counted)
    sizes = np.concatenate([counted[:, None], last - first], axis=1)  # (n, 1 + BINS)
    parts = sums.reshape(*sizes.shape, -1) / np.maximum(sizes, 1).astype(np.float32)[:, :, None]  # (n, 1 + BINS, D)
    protein, part = np.nonzero(sizes == 0)
    parts[protein, part] = parts[protein, 0]
    averages: NDArray[np.float32] = parts.reshape(sums.shape)
    return averages
