"""The MLP as named arrays: its shape, and first weights that are the same bits on every machine, without torch."""

from __future__ import annotations

__all__ = ["Parameters", "check_parameters", "format_hidden", "initialize", "layer_widths"]

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError

Parameters = dict[str, NDArray[np.float32]]
"""``layers.I.weight`` (out, in) and ``layers.I.bias`` (out,) for each layer I, in order."""

_BITS = 23


def format_hidden(hidden: Sequence[int]) -> str:
    """Return an MLP's name, ``"256-128-64"`` for ``(256, 128, 64)``; `fedbio.settings.parse_hidden` reads it."""
    return "-".join(map(str, hidden))


def initialize(width: int, hidden: Sequence[int], classes: int, *, seed: int) -> Parameters:
    """Make the parameters that training starts from.

    Parameters
    ----------
    width : int
        Length of an embedding, D.
    hidden : sequence of int
        Widths of the hidden layers.
    classes : int
        Number of classes, C.
    seed : int
        At least 0, below 2**64.

    Returns
    -------
    dict of str to ndarray, float32

    Notes
    -----
    Weights and biases are uniform within 1 / sqrt(inputs), the default of ``torch.nn.Linear``. Each layer has a Philox
    stream of its own, and only integer operations and one float32 multiplication make a number.

    Examples
    --------
    >>> {name: array.shape for name, array in initialize(768, (32,), 10, seed=0).items()}
    {'layers.0.weight': (32, 768), 'layers.0.bias': (32,), 'layers.1.weight': (10, 32), 'layers.1.bias': (10,)}
    """
    parameters: Parameters = {}
    for layer, (inputs, outputs) in enumerate(pairwise((width, *hidden, classes))):
        numbers = _uniform((inputs + 1) * outputs, 1 / math.sqrt(inputs), seed, layer)
        parameters[f"layers.{layer}.weight"] = numbers[:-outputs].reshape(outputs, inputs)
        parameters[f"layers.{layer}.bias"] = numbers[-outputs:]
    return parameters


def _uniform(count: int, bound: float, seed: int, stream: int) -> NDArray[np.float32]:
    raw = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw((count + 1) // 2)
    bits = raw.astype("<u8", copy=False).view("<u4")[:count] >> np.uint32(32 - _BITS)
    # 23 bits become an odd number between -2**23 and 2**23, which float32 holds exactly
    odd = 2 * bits.astype(np.int32) + (1 - (1 << _BITS))
    return odd.astype(np.float32) * np.float32(bound / (1 << _BITS))


def layer_widths(parameters: Mapping[str, NDArray[np.float32]]) -> tuple[int, ...]:
    """Return the widths of input, hidden layers and output, ``(D, ..., C)``.

    Raises
    ------
    DataError
        If these are not the float32 parameters of an MLP; the message names the tensor.
    """
    if not parameters or len(parameters) % 2:
        raise DataError(f"expected a weight and a bias for each layer of an MLP, found {_listed(parameters)}")
    widths: list[int] = []
    for layer in range(len(parameters) // 2):
        weight, bias = (parameters.get(f"layers.{layer}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None:
            raise DataError(f"layers.{layer} of an MLP is missing, found {_listed(parameters)}")
        if weight.dtype != np.float32 or bias.dtype != np.float32:
            raise DataError(f"layers.{layer}: expected float32, found {weight.dtype} and {bias.dtype}")
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or (widths and weight.shape[1] != widths[-1]):
            raise DataError(f"layers.{layer}: shapes {weight.shape} and {bias.shape} do not fit the layer before")
        widths += weight.shape[:1] if widths else weight.shape[::-1]
    return tuple(widths)


def _listed(parameters: Mapping[str, NDArray[np.float32]]) -> str:
    return ", ".join(parameters) or "nothing"


def check_parameters(
    parameters: Mapping[str, NDArray[np.float32]], *, width: int, hidden: Sequence[int], classes: int
) -> None:
    """Refuse parameters of another MLP.

    Raises
    ------
    DataError
        With the widths that were found and those that were expected.
    """
    found, expected = layer_widths(parameters), (width, *hidden, classes)
    if found != expected:
        raise DataError(f"an MLP of widths {format_hidden(found)} instead of {format_hidden(expected)}")
