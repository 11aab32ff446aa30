"""The weights that training from scratch begins with: random numbers from a seed, and attention that looks around."""

from __future__ import annotations

__all__ = ["first_head", "first_weights"]

import math

import numpy as np
from numpy.typing import NDArray

from fedbio.encoder.untrained import untrained_weights
from fedbio.weights import EncoderConfig, Weights, head_shapes

HEAD_STD = 0.02
"""What Megatron BERT starts the dense map of its head from."""
POSITION_STD = 0.05
"""Size of the first positions; random ones grow to about that within ten million tokens."""
LOOK_STD = 0.088
"""Of the maps to queries and keys that look around, at width 256 and 64 numbers a head: most of the attention of such a
head then goes to three or four residues."""


def first_weights(config: EncoderConfig, seed: int) -> Weights:
    """Make the weights that training from scratch starts from, with a language-model head.

    They are those of an untrained encoder, unless positions are learned. These begin as sinusoids [1]_, of which one
    linear map makes those of any neighbour, and the heads of the first half of the layers look one residue to the
    left, one to the right, two to the left and so on: their queries are the keys of that neighbour. It is the shape
    that attention comes to anyway, as in [2]_; from random positions a training of ten million tokens does not find out
    which residues are neighbours.

    References
    ----------
    .. [1] Vaswani et al., "Attention is all you need", 2017, arXiv 1706.03762, section 3.5.
    .. [2] Trockman and Kolter, "Mimetic initialization of self-attention layers", 2023, arXiv 2305.09828.
    """
    weights = untrained_weights(config, seed) | first_head(config, seed)
    if config.positions == "learned" and config.width % 2 == 0:
        weights["positions.weight"] = _sinusoids(config.max_tokens, config.width)
        _look_around(weights, config, seed)
    return weights


def first_head(config: EncoderConfig, seed: int) -> Weights:
    """Make the language-model head alone, for an encoder that has none."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    head: Weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in head_shapes(config).items()}
    head["lm_head.norm.weight"] += 1
    dense = head["lm_head.dense.weight"]
    dense += HEAD_STD * random.standard_normal(dense.shape, dtype=np.float32)
    return head


def _frequencies(count: int, width: int) -> NDArray[np.float64]:
    """Return the frequencies of sinusoids of which the longest is about as long as the longest protein."""
    frequencies: NDArray[np.float64] = count ** -(np.arange(0, width, 2) / width)
    return frequencies


def _sinusoids(count: int, width: int) -> NDArray[np.float32]:
    """Return positions, sines before cosines, shape (count, width)."""
    steps = np.arange(count)[:, None] * _frequencies(count, width)
    waves = np.concatenate([np.sin(steps), np.cos(steps)], axis=1)
    return (math.sqrt(2) * POSITION_STD * waves).astype(np.float32)


def _look_around(weights: Weights, config: EncoderConfig, seed: int) -> None:
    """Make each head of the first half of the layers look at a neighbour of its own."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1])))
    width, size = config.width, config.width // config.heads
    # queries times keys grow with the width and the root of a head's size
    std = LOOK_STD * math.sqrt(256 / width) * (64 / size) ** 0.25
    frequencies = _frequencies(config.max_tokens, width)
    for number in range(config.heads * (config.layers // 2)):
        layer, head = divmod(number, config.heads)
        offset = number // 2 + 1 if number % 2 else -(number // 2 + 1)
        keys = std * random.standard_normal((size, width), dtype=np.float32)
        # the sinusoids of the place at this offset are those of the place itself, turned
        turn = frequencies * offset
        sines, cosines = keys[:, : width // 2], keys[:, width // 2 :]
        queries = np.concatenate(
            [sines * np.cos(turn) - cosines * np.sin(turn), sines * np.sin(turn) + cosines * np.cos(turn)], axis=1
        )
        rows = slice(head * size, (head + 1) * size)
        maps = weights[f"layers.{layer}.qkv.weight"]
        maps[rows], maps[width:][rows] = queries, keys
