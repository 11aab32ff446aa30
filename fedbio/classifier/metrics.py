"""Measures of a classification, all from the confusion matrix: rows are true classes, columns predicted ones."""

from __future__ import annotations

__all__ = ["accuracy", "confusion_matrix", "f1_per_class", "macro_f1", "mcc"]

import math

import numpy as np
from numpy.typing import NDArray

Confusion = NDArray[np.int64]
"""Shape (C, C); confusion matrices of several sites may be added."""


def confusion_matrix(targets: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> Confusion:
    """Count pairs of true and predicted class, shape (`classes`, `classes`).

    Examples
    --------
    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = np.bincount(targets * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes).astype(np.int64, copy=False)


def accuracy(confusion: Confusion) -> float:
    """Return the share of proteins on the diagonal; nan without any protein."""
    count = int(confusion.sum())
    return int(np.trace(confusion)) / count if count else math.nan


def f1_per_class(confusion: Confusion) -> NDArray[np.float64]:
    """Return each class's F1, the harmonic mean of precision and recall, shape (C,).

    It is 0 for a class that is never hit, and nan for a class that neither occurs nor is predicted.
    """
    both = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = np.full(len(confusion), np.nan)
    np.divide(2.0 * np.diagonal(confusion), both, out=f1, where=both > 0)
    return f1


def macro_f1(confusion: Confusion) -> float:
    """Return the mean F1 over the classes that occur or are predicted; nan without any protein."""
    f1 = f1_per_class(confusion)
    defined = ~np.isnan(f1)
    return float(f1[defined].mean()) if defined.any() else math.nan


def mcc(confusion: Confusion) -> float:
    """Return Matthews's correlation coefficient for several classes (Gorodkin 2004).

    It is 0 where one class takes all of the true or of the predicted, and nan without any protein.
    """
    # Python's integers: fourth powers of counts pass int64 at 55,000 proteins
    true = [int(number) for number in confusion.sum(axis=1)]
    predicted = [int(number) for number in confusion.sum(axis=0)]
    count = sum(true)
    if not count:
        return math.nan
    covariance = int(np.trace(confusion)) * count - sum(t * p for t, p in zip(true, predicted, strict=True))
    spread_true = count**2 - sum(t * t for t in true)
    spread_predicted = count**2 - sum(p * p for p in predicted)
    if not spread_true or not spread_predicted:
        return 0.0
    return covariance / math.sqrt(spread_true * spread_predicted)
