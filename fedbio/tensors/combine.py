"""Combine models of several sites: check each against what was asked for, then average them in a fixed order."""

from __future__ import annotations

__all__ = ["check_matches", "manifest", "weighted_mean"]

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedbio.errors import ProtocolError

Tensors = Mapping[str, np.ndarray[Any, Any]]
Manifest = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def manifest(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return the shape and dtype of each tensor: what `check_matches` holds an answer against."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def check_matches(tensors: Tensors, expected: Tensors | Manifest, *, source: str = "") -> None:
    """Refuse tensors whose names, shapes, dtypes or finiteness differ from what is expected.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        What has arrived.
    expected : mapping
        A model to match, or the `manifest` of one.
    source : str
        Where the tensors came from, for the message.

    Raises
    ------
    ProtocolError
        Naming source and tensor, what was found and what was expected.
    """
    prefix = f"{source}: " if source else ""
    wanted = {
        name: (each.shape, each.dtype) if isinstance(each, np.ndarray) else each for name, each in expected.items()
    }
    for kind, names in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if names:
            shown = ", ".join(map(repr, sorted(names)[:3]))
            raise ProtocolError(f"{prefix}{len(names)} tensor(s) {kind}: {shown}; the model differs from the task's")
    for name, (shape, dtype) in wanted.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ProtocolError(
                f"{prefix}tensor {name!r}: {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
            )
        if tensor.dtype.kind in "fc" and not _is_finite(tensor):
            bad = int(tensor.size - np.count_nonzero(np.isfinite(tensor)))
            raise ProtocolError(f"{prefix}tensor {name!r}: {bad} of {tensor.size} values are not finite")


def _is_finite(tensor: np.ndarray[Any, Any]) -> bool:
    # one pass without a temporary array decides nearly always: a sum can only hide infinities as NaN, never as a number
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(tensor, axis=None)
    return bool(np.isfinite(total)) or bool(np.isfinite(tensor).all())


def weighted_mean(models: Sequence[tuple[str, Tensors, float]]) -> dict[str, np.ndarray[Any, Any]]:
    """Average models tensor by tensor: the same bits whatever the order in which they arrived.

    Parameters
    ----------
    models : sequence of (name, tensors, weight)
        Sorted by name before anything is added; weights are finite, not negative and not all zero.

    Returns
    -------
    dict of str to ndarray, dtype=np.float32
        In the order of the first model's names. Sums are taken in float64, one tensor at a time.

    Raises
    ------
    ProtocolError
        If a model's names or shapes differ from the first one's, or a weight cannot be used.
    """
    if not models:
        raise ValueError("there is no model to average")
    ordered = sorted(models, key=lambda model: model[0])
    for name, _, weight in ordered:
        if not math.isfinite(weight) or weight < 0:
            raise ProtocolError(f"{name}: weight {weight} is not a finite number >= 0")
    total = math.fsum(weight for _, _, weight in ordered)
    if total <= 0:
        raise ProtocolError(f"the weights of {', '.join(name for name, _, _ in ordered)} are all zero")
    _, first, _ = ordered[0]
    for name, tensors, _ in ordered[1:]:
        for key in sorted(first.keys() ^ tensors.keys()):
            raise ProtocolError(f"{name}: tensor {key!r} is not in every model")
        for key, tensor in tensors.items():
            if tensor.shape != first[key].shape:
                found, wanted = list(tensor.shape), list(first[key].shape)
                raise ProtocolError(f"{name}: tensor {key!r}: shape {found}, expected {wanted}")
    mean = {}
    for key, reference in first.items():
        accumulated = np.zeros(reference.shape, np.float64)
        term = np.empty(reference.shape, np.float64)
        for _, tensors, weight in ordered:
            np.multiply(tensors[key], weight / total, out=term)
            accumulated += term
        mean[key] = accumulated.astype(np.float32)
    return mean
