"""Share the proteins of a file out among workers: contiguous ranges of about as many residues each."""

from __future__ import annotations

__all__ = ["plan_shards"]

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_shards(lengths: Sequence[int] | NDArray[np.int64], shards: int) -> list[range]:
    """Divide proteins, in their order, into contiguous ranges that are balanced by residues.

    Parameters
    ----------
    lengths : sequence of int, or ndarray, shape (n,)
        Residues of each protein, none below 0.
    shards : int
        How many ranges to make, at least 1.

    Returns
    -------
    list of range, length `shards`
        They cover 0 to n without a gap, in order. None is empty as long as there are `shards` proteins; of fewer
        proteins each is a range of its own, and the last ranges are empty.

    Raises
    ------
    ValueError
        If `shards` is below 1.

    Notes
    -----
    Each border stands where it is nearest to its ideal place, a multiple of the total over `shards`, so a range
    exceeds an equal share by at most the length of one protein, save where ranges would be empty. A function of the
    lengths alone.

    Examples
    --------
    >>> plan_shards([300, 100, 100, 100, 600], 3)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    if shards < 1:
        raise ValueError(f"{shards} shards")
    n = len(lengths)
    ends = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
    borders = [0]
    for shard in range(1, shards):
        # in whole numbers, so that the borders are the same on every machine
        ideal = int(ends[-1]) * shard
        place = int(np.searchsorted(ends, -(-ideal // shards)))
        if place and ideal - int(ends[place - 1]) * shards <= int(ends[place]) * shards - ideal:
            place -= 1
        # one protein at least for this range, and for each of those to come
        borders.append(min(max(place, borders[-1] + 1), max(n - (shards - shard), borders[-1] + 1), n))
    borders.append(n)
    return [range(first, last) for first, last in itertools.pairwise(borders)]
