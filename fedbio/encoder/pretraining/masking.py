"""Hide residues for the network to predict, as ESM-1nv's model card says."""

from __future__ import annotations

__all__ = ["Masker"]

import numpy as np
from numpy.typing import NDArray

from fedbio.encoder.alphabet import ALPHABETS

STANDARD = "ACDEFGHIKLMNPQRSTVWY"


class Masker:
    """Choose the residues to predict, and what the network sees in their place.

    Of all residues but X (nobody knows which residue it stands for), `share` are to be predicted: `mask_token_share` of
    these become the mask token, `random_share` another of the twenty standard residues, and the rest stays. The
    start and end tokens are never chosen.

    Parameters
    ----------
    alphabet : str
        See `fedbio.weights.EncoderConfig.alphabet`.
    share, mask_token_share, random_share : float

    References
    ----------
    .. [1] BioNeMo Framework 1.10, docs/bionemo/models/esm1-nv.md, and examples/protein/esm1nv/conf/base_config.yaml
    """

    def __init__(self, alphabet: str, *, share: float, mask_token_share: float, random_share: float) -> None:
        known = ALPHABETS[alphabet]
        self.mask = known.pieces.index("<mask>")
        self._residues = np.array([known.pieces.index(letter) for letter in STANDARD], dtype=np.uint8)
        self._eligible = np.zeros(256, dtype=bool)
        for number, piece in enumerate(known.pieces):
            self._eligible[number] = len(piece) == 1 and piece.isalpha() and piece != "X"
        self._share, self._hidden, self._changed = share, mask_token_share, mask_token_share + random_share

    def __call__(
        self, tokens: NDArray[np.uint8], random: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return what the network sees, and the places of what it shall predict.

        Parameters
        ----------
        tokens : ndarray, shape (T,), uint8
            A pack; it is not changed.
        random : numpy.random.Generator

        Returns
        -------
        seen : ndarray, shape (T,), uint8
        places : ndarray, shape (M,), int64
            In ascending order; the tokens there are the targets.
        """
        places = np.flatnonzero(self._eligible[tokens] & (random.random(len(tokens), dtype=np.float32) < self._share))
        fate = random.random(len(places), dtype=np.float32)
        seen = tokens.copy()
        seen[places[fate < self._hidden]] = self.mask
        changed = places[(fate >= self._hidden) & (fate < self._changed)]
        seen[changed] = self._others(tokens[changed], random)
        return seen, places

    def _others(self, tokens: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
        """Return for each token one of the standard residues that are not the same, all with equal chance."""
        circle = len(self._residues)
        same = tokens[:, None] == self._residues  # (M, 20)
        # B, Z, U and O are not on the circle of the twenty: they begin anywhere
        own = np.where(same.any(1), same.argmax(1), random.integers(0, circle, len(tokens)))
        # a step of 1 to 19 never ends where it began
        return self._residues[(own + random.integers(1, circle, len(tokens))) % circle]
