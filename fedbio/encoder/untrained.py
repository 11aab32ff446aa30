"""Weights of an untrained encoder from a seed: the same bits on every machine, without torch.

Only integer operations and one float32 multiplication make a weight, so nothing depends on a maths library. The
numbers are uniform with the standard deviation that Megatron BERT starts from: 0.02, and 0.02 / sqrt(2 * layers) for
the two linear maps of a layer that write into the residual stream.
"""

from __future__ import annotations

__all__ = ["BUILT_IN", "untrained_weights"]

import math

import numpy as np
from numpy.typing import NDArray

from fedbio.weights import ESM1NV, EncoderConfig, Weights, inference_shapes

BUILT_IN = {ESM1NV.name: ESM1NV}
"""Architectures that need no file; their weights come from a seed."""

_STD = 0.02
_BITS = 23


def untrained_weights(config: EncoderConfig, seed: int) -> Weights:
    """Make the weights that inference uses.

    Parameters
    ----------
    config : EncoderConfig
        The architecture.
    seed : int
        At least 0, below 2**63.

    Returns
    -------
    dict of str to ndarray, float32
        Every tensor of `fedbio.weights.inference_shapes`.

    Notes
    -----
    Each tensor has a Philox stream of its own (key: the seed and the tensor's place in the sorted list of names).
    """
    into_residual = _STD / math.sqrt(2 * config.layers)
    weights: Weights = {}
    for place, (name, shape) in enumerate(inference_shapes(config).items()):
        if name.endswith("norm.weight"):
            weights[name] = np.ones(shape, dtype=np.float32)
        elif name.endswith(".bias"):
            weights[name] = np.zeros(shape, dtype=np.float32)
        else:
            std = into_residual if name.endswith((".out.weight", ".down.weight")) else _STD
            weights[name] = _uniform(math.prod(shape), std, seed, place).reshape(shape)
    return weights


def _uniform(count: int, std: float, seed: int, place: int) -> NDArray[np.float32]:
    raw = np.random.Philox(key=np.array([seed, place], dtype=np.uint64)).random_raw((count + 1) // 2)
    # 23 bits become an odd number between -2**23 and 2**23, which float32 holds exactly
    odd = (raw.astype("<u8", copy=False).view("<u4")[:count] >> np.uint32(32 - _BITS)).astype(np.int32)
    odd <<= 1
    odd += 1 - (1 << _BITS)
    weights = odd.astype(np.float32)
    weights *= np.float32(math.sqrt(3.0) * std / (1 << _BITS))
    return weights
