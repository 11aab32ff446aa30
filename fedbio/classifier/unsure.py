"""Choose below which probability a prediction is flagged as unsure, from counts that several sites may add up."""

from __future__ import annotations

__all__ = ["ALWAYS_UNSURE", "choose_threshold", "confidence_counts", "is_unsure", "meaning"]

import numpy as np
from numpy.typing import NDArray

BINS = 50
"""Bins of the top probability between 0 and 1, each 0.02 wide."""
ACCURACY = 0.8
"""What the predictions that are not flagged shall reach on validation proteins."""
LEAST = 10
"""So many validation proteins must be left, or their accuracy means nothing."""
ALWAYS_UNSURE = 1.0
"""The threshold of a model that reaches `ACCURACY` nowhere: every prediction is flagged."""


def confidence_counts(probabilities: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count predictions by their top probability.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C), float32
        Of validation proteins.
    targets : ndarray, shape (n,), int64

    Returns
    -------
    ndarray, shape (2, BINS), int64
        All predictions, and the correct ones, by bin; those of several sites may be added.
    """
    bins = np.minimum((probabilities.max(axis=1) * BINS).astype(np.int64), BINS - 1)
    correct = probabilities.argmax(axis=1) == targets
    return np.stack([np.bincount(bins, minlength=BINS), np.bincount(bins[correct], minlength=BINS)]).astype(np.int64)


def choose_threshold(counts: NDArray[np.int64]) -> float:
    """Return the lowest threshold at and above which predictions are right often enough.

    Parameters
    ----------
    counts : ndarray, shape (2, BINS), int64
        From `confidence_counts`, of one party or summed over all.

    Returns
    -------
    float
        A multiple of 1 / `BINS`: at least `LEAST` validation proteins have a top probability of this or more,
        and `ACCURACY` of them are predicted correctly. `ALWAYS_UNSURE` if there is no such number.
    """
    kept, correct = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    enough = np.flatnonzero((kept >= LEAST) & (correct >= ACCURACY * kept))
    return int(enough[0]) / BINS if len(enough) else ALWAYS_UNSURE


def is_unsure(probabilities: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Flag predictions, shape (n, C), whose top probability is below `threshold`."""
    if threshold >= ALWAYS_UNSURE:
        return np.ones(len(probabilities), dtype=np.bool_)
    flags: NDArray[np.bool_] = probabilities.max(axis=1) < threshold
    return flags


def meaning(threshold: float) -> str:
    """Say which predictions are flagged, and why these."""
    if threshold >= ALWAYS_UNSURE:
        return (
            f"all are flagged: the model has no threshold above which at least {ACCURACY:.0%} of {LEAST} or more "
            "validation proteins were predicted correctly"
        )
    return (
        f"the highest probability is below {threshold:.2f}; the threshold is the model's, chosen so that "
        f"at least {ACCURACY:.0%} of the validation proteins at or above it were predicted correctly"
    )
