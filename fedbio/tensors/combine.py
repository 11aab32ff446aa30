"""Average models of several sites, block by block and in a fixed order, so that timing and memory leave no trace."""

from __future__ import annotations

__all__ = ["MEAN_DTYPE", "BlockMean", "aligned", "mean_manifest", "shares", "weighted_mean"]

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import ProtocolError
from fedbio.tensors.check import Manifest

Tensors = Mapping[str, np.ndarray[Any, Any]]

MEAN_DTYPE = np.dtype("<f4")
"""What means are stored as."""

BLOCK_VALUES = 1 << 15
"""Values averaged at a time: two blocks of float64 sums, and what they are made from, stay in a core's L2 cache."""


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Return each site's part of the whole, in the order in which sites are added: sorted by name.

    Raises
    ------
    ProtocolError
        If a weight is not a finite number >= 0, or all of them are zero.
    """
    ordered = sorted(weights)
    for name in ordered:
        if not math.isfinite(weights[name]) or weights[name] < 0:
            raise ProtocolError(f"{name}: weight {weights[name]} is not a finite number >= 0")
    total = math.fsum(weights.values())
    if total <= 0:
        raise ProtocolError(f"the weights of {', '.join(ordered)} are all zero")
    return {name: weights[name] / total for name in ordered}


def mean_manifest(models: Manifest) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return the shape and dtype of each tensor in the mean of models that are like this."""
    return {name: (shape, MEAN_DTYPE) for name, (shape, _) in models.items()}


class BlockMean:
    """Averages runs of values in float64, one short block after the other; its two blocks are all the memory it takes.

    Parameters
    ----------
    shares : sequence of float
        The part of each run in the mean, in the order in which they are added.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = tuple(shares)
        self._sum, self._term = np.empty(BLOCK_VALUES), np.empty(BLOCK_VALUES)

    def __call__(self, runs: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
        """Write the mean of `runs`, one for each share and all as long as `out`, to `out`; all have one dimension.

        Values that are not finite make means that are not, without a warning: look at `out`.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, len(out), BLOCK_VALUES):
                block = out[begin : begin + BLOCK_VALUES]
                total, term = self._sum[: len(block)], self._term[: len(block)]
                target = total
                for run, share in zip(runs, self._shares, strict=True):
                    # a cast of its own: a product of float32 values would be rounded before it is added
                    target[:] = run[begin : begin + len(block)]
                    np.multiply(target, share, out=target)
                    if target is term:
                        np.add(total, term, out=total)
                    target = term
                block[:] = total


def aligned(models: Sequence[tuple[str, Tensors, float]]) -> list[tuple[str, Tensors, float]]:
    """Return models sorted by name, all of which have the same tensors.

    Raises
    ------
    ProtocolError
        If a model's names or shapes differ from the first one's.
    """
    if not models:
        raise ValueError("there is no model to average")
    ordered = sorted(models, key=lambda model: model[0])
    if len({name for name, _, _ in ordered}) < len(ordered):
        raise ValueError("two models have one name")
    _, first, _ = ordered[0]
    for name, tensors, _ in ordered[1:]:
        for key in sorted(first.keys() ^ tensors.keys()):
            raise ProtocolError(f"{name}: tensor {key!r} is not in every model")
        for key, tensor in tensors.items():
            if tensor.shape != first[key].shape:
                found, wanted = list(tensor.shape), list(first[key].shape)
                raise ProtocolError(f"{name}: tensor {key!r}: shape {found}, expected {wanted}")
    return ordered


def weighted_mean(models: Sequence[tuple[str, Tensors, float]]) -> dict[str, np.ndarray[Any, Any]]:
    """Average models tensor by tensor: the same bits whatever the order in which they arrived.

    Parameters
    ----------
    models : sequence of (name, tensors, weight)
        Sorted by name before anything is added; weights are finite, not negative and not all zero.

    Returns
    -------
    dict of str to ndarray, dtype=np.float32
        In the order of the first model's names. Products and sums are taken in float64, in short blocks.

    Raises
    ------
    ProtocolError
        If a model's names or shapes differ from the first one's, or a weight cannot be used.
    """
    ordered = aligned(models)
    parts = shares({name: weight for name, _, weight in ordered})
    average = BlockMean(list(parts.values()))
    mean = {}
    for key, reference in ordered[0][1].items():
        mean[key] = np.empty(reference.shape, MEAN_DTYPE)
        average([tensors[key].reshape(-1) for _, tensors, _ in ordered], mean[key].reshape(-1))
    return mean
