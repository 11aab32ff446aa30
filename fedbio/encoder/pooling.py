"""Turn the vectors of tokens into those of pieces, on the device where they are."""

from __future__ import annotations

__all__ = ["Pooling", "Span", "pool", "row_width"]

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedbio.encoder.bins import BINS, piece_bins
from fedbio.encoder.network import send
from fedbio.encoder.packs import ENDS, Plan

Pooling = Literal["mean", "ends", "max", "start", "residues"]
"""How the vectors of a protein's residues become its embedding."""


class Span(NamedTuple):
    """Some pieces of a plan that are computed together, those from `first` to `last`."""

    plan: Plan
    first: int
    last: int


def row_width(width: int, pooling: Pooling) -> int:
    """Return how long a row is that an encoder of some width makes."""
    return width * (1 + BINS) if pooling == "ends" else width


def pool(hidden: Tensor, span: Span, pooling: Pooling) -> Tensor:
    """Pool over the residues of each piece.

    Parameters
    ----------
    hidden : Tensor, shape (T, D), float32
        Token by token, piece after piece, each with its start and end token.
    span : Span
    pooling : {"mean", "ends", "max", "start", "residues"}

    Returns
    -------
    Tensor, shape (pieces, D), (pieces, (1 + BINS) * D) or (residues that count, D), float32
        For each piece the sum over the residues that count (mean), that and the sums over those in each bin (ends),
        their maximum (max) or the vector of the start token (start); or the vectors of all residues that count
        (residues).
    """
    plan, here = span.plan, slice(span.first, span.last)
    begin = plan.begin[here]
    lengths = plan.end[here] - begin + ENDS
    starts = np.cumsum(lengths) - lengths
    if pooling == "start":
        return hidden[send(torch.from_numpy(starts), hidden.device)]
    counted = plan.pool_end[here] - plan.pool_begin[here]
    before = plan.pool_begin[here] - begin + 1
    # start token and left context, residues that count, right context and end token: every second of three is wanted
    parts = np.stack([before, counted, lengths - before - counted], axis=1).reshape(-1)
    if pooling == "residues":
        wanted = np.repeat(np.resize([False, True, False], len(parts)), parts)
        return hidden[send(torch.from_numpy(np.flatnonzero(wanted)), hidden.device)]
    how = "max" if pooling == "max" else "sum"
    # unsafe leaves out checks for which the device's queue would have to be emptied; the parts sum up to T
    rows = torch.segment_reduce(hidden, how, lengths=send(torch.from_numpy(parts), hidden.device), axis=0, unsafe=True)[
        1::3
    ]
    if pooling != "ends":
        return rows
    first, last = piece_bins(*span)
    tokens = (starts + 1)[:, None]
    bins = _sums(hidden, (tokens + first).reshape(-1), (tokens + last).reshape(-1))  # (pieces * BINS, D)
    return torch.cat([rows, bins.view(len(rows), -1)], dim=1)


def _sums(hidden: Tensor, first: NDArray[np.int64], last: NDArray[np.int64]) -> Tensor:
    """Return the sums of the rows from ``first[k]`` to ``last[k]``, zero where these are equal, shape (k, D)."""
    counts = last - first
    offsets = np.cumsum(counts) - counts
    rows = np.arange(counts.sum()) + np.repeat(first - offsets, counts)
    # gathers and adds in one pass; some residues are in two bins, and most in none
    return functional.embedding_bag(
        send(torch.from_numpy(rows), hidden.device),
        hidden,
        send(torch.from_numpy(offsets), hidden.device),
        mode="sum",
    )
