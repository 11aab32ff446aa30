"""Tests of first weights: positions know their neighbours, and attention looks at them."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.encoder.pretraining.beginning import first_weights
from fedbio.encoder.pretraining.recipe import PRESETS
from fedbio.encoder.untrained import untrained_weights
from fedbio.weights import EncoderConfig

TOKENS = 200


@pytest.mark.parametrize("preset", ["esm1nv-mini", "esm1nv-44m"])
def test_heads_of_the_first_layers_look_at_one_neighbour_each(preset: str) -> None:
    config = PRESETS[preset].config
    weights, random = first_weights(config, 0), np.random.default_rng(0)
    residues = random.permutation(np.tile(np.arange(5, 25), TOKENS // 20))
    x = weights["tokens.weight"][residues] + weights["positions.weight"][:TOKENS]
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    size, distances = config.width // config.heads, np.arange(TOKENS)[None] - np.arange(TOKENS)[:, None]
    inner = slice(50, 150)
    for number in range(config.heads * (config.layers // 2)):
        layer, head = divmod(number, config.heads)
        offset = number // 2 + 1 if number % 2 else -(number // 2 + 1)
        maps = weights[f"layers.{layer}.qkv.weight"].reshape(3, config.heads, size, config.width)[:2, head]
        queries, keys = (x @ each.T for each in maps)
        scores = np.exp(queries @ keys.T / np.sqrt(size))
        # a residue is like itself whatever its place; a masked one has nothing to say
        scores[np.eye(TOKENS, dtype=bool)] = 0
        attention = scores / scores.sum(1, keepdims=True)
        near = attention * (np.abs(distances - offset) <= 3)
        assert near[inner].sum(1).mean() > 0.7, (layer, head)
        looked = (attention * (distances == offset))[inner].sum(1).mean()
        assert looked > 0.15, (layer, head)


def test_all_else_is_as_untrained_and_of_the_seed() -> None:
    config = PRESETS["esm1nv-mini"].config
    weights, plain = first_weights(config, 3), untrained_weights(config, 3)
    changed = {name for name, tensor in plain.items() if not np.array_equal(tensor, weights[name])}
    assert changed == {"positions.weight", *(f"layers.{layer}.qkv.weight" for layer in range(3))}
    for layer in range(3):
        values = slice(2 * config.width, None)
        name = f"layers.{layer}.qkv.weight"
        np.testing.assert_array_equal(weights[name][values], plain[name][values])
    again, other = first_weights(config, 3), first_weights(config, 4)
    assert all(np.array_equal(again[name], tensor) for name, tensor in weights.items())
    assert not np.array_equal(other["layers.0.qkv.weight"][:256], weights["layers.0.qkv.weight"][:256])


def test_rotary_positions_begin_untrained() -> None:
    config = EncoderConfig(layers=2, heads=2, width=32, ffn=64, max_tokens=66, positions="rotary")
    plain = untrained_weights(config, 0)
    assert all(np.array_equal(plain[name], first_weights(config, 0)[name]) for name in plain)
