"""Standardize features to mean 0 and standard deviation 1, from sums that several sites may add up."""

from __future__ import annotations

__all__ = ["Moments", "Standardizer", "moments"]

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError

CONSTANT = 1e-5
"""A feature whose standard deviation is below this share of its size is constant, but for rounding."""


@dataclass(frozen=True)
class Moments:
    """Sums over proteins.

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


def moments(features: NDArray[np.float32]) -> Moments:
    """Sum features, shape (n, D), and their squares in float64."""
    return Moments(
        len(features),
        features.sum(axis=0, dtype=np.float64),
        np.einsum("nd,nd->d", features, features, dtype=np.float64),
    )


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
    def fit(cls, features: NDArray[np.float32]) -> Standardizer:
        """Make the standardizer of features, shape (n, D)."""
        return cls.from_moments([moments(features)])

    def apply(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return standardized features, shape (n, D), float32."""
        standardized = features - self.mean
        standardized /= self.scale
        return standardized
