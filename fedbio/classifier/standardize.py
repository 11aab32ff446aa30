"""Standardize features to mean 0 and standard deviation 1, from sums that several sites may add up."""

from __future__ import annotations

__all__ = ["Moments", "Standardizer", "moments"]

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedbio.classifier.residues import Features, Residues
from fedbio.errors import DataError

CONSTANT = 1e-5
"""A feature whose standard deviation is below this share of its size is constant, but for rounding."""

F = TypeVar("F", NDArray[np.float32], Residues, Features)


@dataclass(frozen=True)
class Moments:
    """Sums over proteins, or over their residues.

    Parameters
    ----------
    count : int
    total : ndarray, shape (D,), float64
        Sum of each feature.
    squares : ndarray, shape (D,), float64
        Sum of its squares.
    """

    count: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]


def moments(features: Features) -> Moments:
    """Sum features, shape (n, D), and their squares in float64; of residues, over all of them."""
    if isinstance(features, Residues):
        return _moments_of_residues(features)
    return Moments(
        len(features),
        features.sum(axis=0, dtype=np.float64),
        np.einsum("nd,nd->d", features, features, dtype=np.float64),
    )


def _moments_of_residues(features: Residues) -> Moments:
    count, total, squares = 0, np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for rows in features.each():
        one = moments(rows)
        count, total, squares = count + one.count, total + one.total, squares + one.squares
    return Moments(count, total, squares)


@dataclass(frozen=True)
class Standardizer:
    """What to subtract from each feature and what to divide it by.

    Parameters
    ----------
    mean, scale : ndarray, shape (D,), float32
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    @classmethod
    def from_moments(cls, parts: Iterable[Moments]) -> Standardizer:
        """Make the standardizer of all proteins behind `parts`.

        The standard deviation is that of the population. A feature that is constant, but for rounding, is divided by 1.

        Raises
        ------
        DataError
            If there is no protein.
        """
        each = list(parts)
        count = sum(part.count for part in each)
        if not count:
            raise DataError("no protein to take mean and variance of; a site needs proteins with SET=train")
        mean = np.sum([part.total for part in each], axis=0) / count
        mean_square = np.sum([part.squares for part in each], axis=0) / count
        scale = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
        scale[scale <= CONSTANT * np.sqrt(mean_square)] = 1.0
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    @classmethod
    def fit(cls, features: Features) -> Standardizer:
        """Make the standardizer of features, shape (n, D), or of residues."""
        return cls.from_moments([moments(features)])

    def apply(self, features: F) -> F:
        """Return standardized features, shape (n, D), float32; residues are standardized when they are read."""
        if isinstance(features, Residues):
            return replace(features, standardizer=self)
        standardized = features - self.mean
        standardized /= self.scale
        return standardized
