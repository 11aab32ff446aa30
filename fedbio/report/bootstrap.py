"""Say how sure a number is that was measured on so many test proteins: the paired bootstrap.

Every statistic of the report is a function of sums over test proteins (so many correct, so many of this class). The
proteins are drawn again with replacement, the sums are taken anew, and the same function is applied. All models share
the same draws, so that a difference between two of them is measured on the same proteins: paired.

B. Efron and R. Tibshirani, An Introduction to the Bootstrap, Chapman & Hall, 1993: percentile intervals.
"""

from __future__ import annotations

__all__ = ["RESAMPLES", "Estimate", "resampled_sums"]

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
"""The ends of a 95 % interval then rest on 50 resamples each."""

_DRAWS_AT_ONCE = 4_000_000
"""Draws held in memory at a time (int64, 32 MB)."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval.

    Parameters
    ----------
    value : float
        The number on the test proteins as they are; NaN if there was nothing to compute it from.
    low, high : float
        The 2.5th and 97.5th percentile over resamples.
    not_above_zero : int
        In how many resamples the number was zero or less.
    resamples : int
        How many resamples there were.
    """

    value: float
    low: float
    high: float
    not_above_zero: int
    resamples: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Estimate:
        """Make an estimate from a statistic of each row of `resampled_sums`, shape (1 + resamples,)."""
        drawn = values[1:][np.isfinite(values[1:])]
        low, high = np.percentile(drawn, [2.5, 97.5]) if drawn.size else (np.nan, np.nan)
        return cls(float(values[0]), float(low), float(high), int((drawn <= 0).sum()), len(drawn))


def resampled_sums(columns: NDArray[np.float32], *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Sum columns over the proteins as they are, and over proteins drawn with replacement.

    Parameters
    ----------
    columns : ndarray, shape (n, K), float32
        One row per test protein; whole numbers, so that sums are exact up to 2**24.
    resamples : int
        Number of draws of n proteins.
    seed : int
        Seed of the draws; the same seed and n give the same draws.

    Returns
    -------
    ndarray, shape (1 + resamples, K), float64
        Row 0 is the sum over the proteins as they are.

    Examples
    --------
    >>> import numpy as np
    >>> resampled_sums(np.ones((5, 1), np.float32), resamples=2).tolist()
    [[5.0], [5.0], [5.0]]
    """
    proteins = len(columns)
    generator = np.random.default_rng(seed)
    sums = np.empty((1 + resamples, columns.shape[1]))
    sums[0] = columns.sum(axis=0, dtype=np.float64)
    step = max(1, _DRAWS_AT_ONCE // proteins)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = generator.integers(0, proteins, size=(rows, proteins))
        draws += np.arange(rows)[:, None] * proteins  # one bincount counts each resample in a range of its own
        times_drawn = np.bincount(draws.ravel(), minlength=rows * proteins).reshape(rows, proteins)
        sums[1 + start : 1 + start + rows] = times_drawn.astype(np.float32) @ columns
    return sums
