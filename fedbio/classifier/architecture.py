"""The network as named arrays: its shape, and first weights that are the same bits on every machine, without torch."""

from __future__ import annotations

__all__ = ["Parameters", "check_parameters", "convolution_shape", "format_hidden", "initialize", "layer_widths"]

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError
from fedbio.networks import Attention, NetworkShape

Parameters = dict[str, NDArray[np.float32]]
"""``layers.I.weight`` (out, in) and ``layers.I.bias`` (out,) for each layer I, in order.

Before them, of light attention: ``attention.values.weight`` (filters, in, kernel), ``attention.values.bias`` (filters,)
and ``attention.scores.weight`` (filters, in, kernel).
"""

ATTENTION = "attention."

_BITS = 23
_ATTENTION_STREAM = 1 << 32
"""Streams of random numbers below it are those of layers."""


def format_hidden(hidden: Sequence[int]) -> str:
    """Return an MLP's name, ``"256-128-64"`` for ``(256, 128, 64)``; `fedbio.settings.parse_hidden` reads it."""
    return NetworkShape(tuple(hidden)).name


def initialize(
    width: int, hidden: Sequence[int], classes: int, *, seed: int, attention: Attention | None = None
) -> Parameters:
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
    attention : Attention, optional
        Light attention before the hidden layers.

    Returns
    -------
    dict of str to ndarray, float32

    Notes
    -----
    Weights and biases are uniform within 1 / sqrt(inputs), the default of ``torch.nn.Linear`` and, with the inputs of
    all residues that a filter sees, of ``torch.nn.Conv1d``. Each layer and each convolution has a Philox stream of its
    own, and only integer operations and one float32 multiplication make a number.

    Examples
    --------
    >>> {name: array.shape for name, array in initialize(768, (32,), 10, seed=0).items()}
    {'layers.0.weight': (32, 768), 'layers.0.bias': (32,), 'layers.1.weight': (10, 32), 'layers.1.bias': (10,)}
    """
    parameters: Parameters = {}
    if attention is not None:
        filters, inputs = attention.width(width), width * attention.kernel
        shape, bound = (filters, width, attention.kernel), 1 / math.sqrt(inputs)
        values = _uniform((inputs + 1) * filters, bound, seed, _ATTENTION_STREAM)
        parameters["attention.values.weight"] = values[:-filters].reshape(shape)
        parameters["attention.values.bias"] = values[-filters:]
        scores = _uniform(inputs * filters, bound, seed, _ATTENTION_STREAM + 1)
        parameters["attention.scores.weight"] = scores.reshape(shape)
        width = 2 * filters
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
    """Return the widths of an MLP's input, hidden layers and output, ``(D, ..., C)``; light attention is left out.

    Raises
    ------
    DataError
        If these are not the float32 parameters of an MLP; the message names the tensor.
    """
    parameters = {name: array for name, array in parameters.items() if not name.startswith(ATTENTION)}
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


def convolution_shape(parameters: Mapping[str, NDArray[np.float32]]) -> tuple[int, int, int] | None:
    """Return filters, input width and kernel of light attention, None if there is none before the MLP.

    Raises
    ------
    DataError
        If there is something that is not its float32 parameters, or does not fit the MLP after it.
    """
    found = {name: array for name, array in parameters.items() if name.startswith(ATTENTION)}
    if not found:
        return None
    parts = [found.get(f"{ATTENTION}{part}") for part in ("values.weight", "values.bias", "scores.weight")]
    values, bias, scores = parts
    if values is None or bias is None or scores is None or len(found) != len(parts):
        raise DataError(f"expected values.weight, values.bias and scores.weight of attention, found {_listed(found)}")
    if not values.dtype == bias.dtype == scores.dtype == np.float32:
        raise DataError(f"attention: expected float32, found {values.dtype}, {bias.dtype} and {scores.dtype}")
    if values.ndim != 3 or values.shape != scores.shape or bias.shape != values.shape[:1] or not values.shape[2] % 2:
        raise DataError(
            f"attention: shapes {values.shape}, {bias.shape} and {scores.shape} are not (filters, inputs, kernel), "
            "(filters,) and again the first, with an odd kernel"
        )
    filters, inputs, kernel = values.shape
    if (takes := layer_widths(parameters)[0]) != 2 * filters:
        raise DataError(f"attention: {filters} filters make {2 * filters} features, but layers.0 takes {takes}")
    return filters, inputs, kernel


def check_parameters(
    parameters: Mapping[str, NDArray[np.float32]],
    *,
    width: int,
    hidden: Sequence[int],
    classes: int,
    attention: Attention | None = None,
) -> None:
    """Refuse parameters of another network.

    Raises
    ------
    DataError
        With the widths that were found and those that were expected.
    """
    convolution = None if attention is None else (attention.width(width), width, attention.kernel)
    if (there := convolution_shape(parameters)) != convolution:
        raise DataError(f"attention of filters, inputs and kernel {there} instead of {convolution}")
    first = width if convolution is None else 2 * convolution[0]
    found, expected = layer_widths(parameters), (first, *hidden, classes)
    if found != expected:
        raise DataError(f"an MLP of widths {format_hidden(found)} instead of {format_hidden(expected)}")
