"""Labelled embeddings: what training and measuring work on."""

from __future__ import annotations

__all__ = ["TrainData"]

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedbio.classifier.residues import Features


@dataclass(frozen=True)
class TrainData:
    """Embeddings with their classes.

    Parameters
    ----------
    features : ndarray, shape (n, D), float32, or Residues
    targets : ndarray, shape (n,), int64
        Number of each protein's class, from 0.
    ids : sequence of str, optional
        The proteins' ids; they never leave the site.
    """

    features: Features
    targets: NDArray[np.int64]
    ids: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.features.shape) != 2 or self.targets.shape != self.features.shape[:1]:
            raise ValueError(f"features {self.features.shape} and targets {self.targets.shape} do not fit together")
        if len(self.ids) not in (0, len(self)):
            raise ValueError(f"{len(self.ids)} ids for {len(self)} proteins")

    def __len__(self) -> int:
        return len(self.targets)
