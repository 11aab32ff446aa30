"""Measure how well hidden residues of held-out proteins are predicted, so that two runs can be compared."""

from __future__ import annotations

__all__ = ["HeldOut", "Measured", "even_windows"]

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbio.encoder.packs import ENDS
from fedbio.encoder.pretraining.batches import make_batch, pack_order
from fedbio.encoder.pretraining.corpus import Proteins
from fedbio.encoder.pretraining.learner import Learner
from fedbio.encoder.pretraining.masking import Masker

SEED = 20_240_501
"""Of the sample and of the masks: the same in every run, whatever its own seed."""

PACK_TOKENS = 8_192
"""The most tokens in a pack, whatever a run learns with: masks are drawn pack by pack."""


@dataclass(frozen=True)
class Measured:
    """Mean loss of the masked residues in nats, how many they were, and of how many residues."""

    loss: float
    masked: int
    residues: int

    @property
    def perplexity(self) -> float:
        """Of how many residues the network could as well have drawn blindly."""
        return math.exp(self.loss)


def even_windows(lengths: NDArray[np.int64], max_residues: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut proteins into as few pieces as possible, of equal length but for one residue, so that each residue is in one.

    Parameters
    ----------
    lengths : ndarray, shape (n,), int64
        All at least 1.
    max_residues : int

    Returns
    -------
    begins, sizes : ndarray, shape (pieces,), int64
        Begins count from the first residue of the first protein, as if all stood end to end.
    """
    pieces = -(-lengths // max_residues)
    protein = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(protein)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = number * lengths[protein] // pieces[protein]
    after = (number + 1) * lengths[protein] // pieces[protein]
    starts = np.cumsum(lengths) - lengths
    return starts[protein] + first, after - first


class HeldOut:
    """Held-out proteins, cut, masked and packed once and for all.

    Every residue counts alike: those of a long protein in its several windows, those of a short one as much.

    Parameters
    ----------
    proteins : Proteins
    alphabet : str
    max_residues : int
    """

    def __init__(self, proteins: Proteins, *, alphabet: str, max_residues: int) -> None:
        self._proteins, self._alphabet = proteins, alphabet
        # 80/10/10 like the model card, whatever the recipe trains with
        self._masker = Masker(alphabet, share=0.15, mask_token_share=0.8, random_share=0.1)
        begins, sizes = even_windows(np.diff(proteins.ends), max_residues)
        shuffled = np.random.Generator(np.random.Philox(SEED)).permutation(len(sizes))
        self._begins, self._sizes = begins[shuffled], sizes[shuffled]

    def __len__(self) -> int:
        return len(self._sizes)

    def measure(
        self,
        learner: Learner,
        *,
        most_residues: int | None = None,
        share: tuple[int, int] = (0, 1),
        join: Callable[[Tensor], None] | None = None,
    ) -> Measured:
        """Compute the mean loss over all pieces, or over a sample that is the same each time.

        Parameters
        ----------
        learner : Learner
        most_residues : int, optional
            Size of the sample.
        share : (int, int)
            Number of this process, and how many there are; each takes its part of the packs.
        join : callable, optional
            As in `Learner.update`.
        """
        count = len(self._sizes)
        if most_residues is not None:
            count = max(1, int(np.searchsorted(np.cumsum(self._sizes), most_residues, side="right")))
        sizes = self._sizes[:count]
        order, borders = pack_order(sizes, PACK_TOKENS)
        sums = torch.zeros(3, dtype=torch.float64)
        for number in range(share[0], len(borders) - 1, share[1]):
            pieces = order[borders[number] : borders[number + 1]]
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([SEED, number])))
            batch = make_batch(
                self._proteins.residues, self._begins[pieces], sizes[pieces], self._alphabet, self._masker, random
            )
            loss, masked = learner.evaluate(batch)
            sums += torch.tensor([loss, masked, len(batch.tokens) - ENDS * len(pieces)], dtype=torch.float64)
        if join is not None:
            sums = sums.to(learner.device)
            join(sums)
        loss, masked, residues = sums.tolist()
        return Measured(loss / max(masked, 1.0), int(masked), int(residues))
