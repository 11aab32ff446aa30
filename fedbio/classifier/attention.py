"""Light attention in torch: residues of unlike numbers become one vector of fixed width for each protein.

Stärk, Dallago, Heinzinger and Rost 2021, "Light attention predicts protein location from the language of life",
Bioinformatics Advances 1(1), vbab035: two convolutions over the residues, values and scores; for each filter the
softmax of the scores over the residues weighs the values, and their sum stands beside the largest value. Unlike there,
no batch normalization follows, whose running means are of one site's proteins and no parameters that could be averaged,
and dropout is of these features: of single residues' values it would make the largest ones larger in training only.
"""

from __future__ import annotations

__all__ = ["LightAttention"]

import numpy as np
import torch
from torch import Tensor, nn

from fedbio.classifier.architecture import Parameters


class LightAttention(nn.Module):
    """Two convolutions; ``values`` and ``scores`` are `torch.nn.Conv1d` with zeros beyond the ends of a protein.

    Dimension letters: B proteins, T rows, D inputs, F filters, K residues of the kernel.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
        Checked, with ``attention.values.weight`` and so on; copied.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        weight, bias, scores = (
            nn.Parameter(torch.from_numpy(np.array(parameters[f"attention.{part}"])))
            for part in ("values.weight", "values.bias", "scores.weight")
        )
        filters, inputs, kernel = weight.shape
        self.gap = kernel // 2
        self.values = nn.Conv1d(inputs, filters, kernel, device="meta")
        self.values.weight, self.values.bias = weight, bias
        # a bias of the scores would cancel in the softmax
        self.scores = nn.Conv1d(inputs, filters, kernel, bias=False, device="meta")
        self.scores.weight = scores

    def forward(self, rows: Tensor, lengths: list[int]) -> Tensor:
        """Return the features of proteins.

        Parameters
        ----------
        rows : Tensor, shape (T, D), float32
            Residues of one protein after the other, with `gap` rows of zeros before, between and after them.
        lengths : list of int
            Residues of each protein, at least 1.

        Returns
        -------
        Tensor, shape (B, 2 F)
            Weighted sums, then maxima.
        """
        # no protein is padded to the longest: each place of the kernel is one product with all rows, shifted
        weights = torch.cat([self.values.weight, self.scores.weight]).permute(2, 1, 0).contiguous()  # (K, D, 2 F)
        filters = self.values.out_channels
        count = len(rows) - 2 * self.gap
        assert self.values.bias is not None
        bias = torch.cat([self.values.bias, self.values.bias.new_zeros(filters)])
        out = torch.addmm(bias, rows[:count], weights[0])  # (T, 2 F)
        for place, weight in enumerate(weights[1:], start=1):
            out.addmm_(rows[place : place + count], weight)
        values, scores = torch.split(out, filters, dim=1)
        # every other piece is a gap
        sizes = [size for length in lengths for size in (length, self.gap)][:-1]
        pooled = [
            torch.cat([(value * score.softmax(dim=0)).sum(dim=0), value.amax(dim=0)])  # (2 F,)
            for value, score in zip(torch.split(values, sizes)[::2], torch.split(scores, sizes)[::2], strict=True)
        ]
        return torch.stack(pooled)
