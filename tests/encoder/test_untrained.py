"""Tests that an untrained encoder is the same bits on every machine, and made without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from fedbio.encoder.untrained import untrained_weights
from fedbio.weights import ESM1NV, EncoderConfig, inference_shapes, weights_digest

SMALL = EncoderConfig(name="small", trained=False, layers=1, heads=2, width=16, ffn=32, vocabulary=30, max_tokens=10)


def test_the_bits_do_not_change() -> None:
    weights = untrained_weights(SMALL, 0)
    assert weights["tokens.weight"][0, :3].tolist() == [
        0.003453497774899006,
        0.017898134887218475,
        -0.009413112886250019,
    ]
    assert weights_digest(weights) == "6d70cc14f5150aaa09ab6ece4199de48ee46c19c53a2b7aefa05adde5a032326"


def test_the_bits_of_the_44m_encoder_do_not_change() -> None:
    assert weights_digest(untrained_weights(ESM1NV, 0)) == (
        "7d5c47c85cb29e11ea80f2026b100cfaf5f19f40c12fc19be785ceda7311f6cd"
    )


def test_another_seed_gives_other_weights() -> None:
    one, two = untrained_weights(SMALL, 1), untrained_weights(SMALL, 2)
    assert not np.array_equal(one["tokens.weight"], two["tokens.weight"])


def test_weights_start_where_megatron_starts() -> None:
    config = EncoderConfig(name="wide", layers=2, heads=4, width=256, ffn=1024)
    weights = untrained_weights(config, 5)
    assert {name: tensor.shape for name, tensor in weights.items()} == inference_shapes(config)
    for name, std in {"tokens": 0.02, "layers.0.qkv": 0.02, "layers.1.out": 0.01, "layers.1.down": 0.01}.items():
        tensor = weights[f"{name}.weight"]
        assert abs(tensor.std() / std - 1) < 0.01
        assert abs(tensor.mean()) < std / 50
        assert abs(tensor).max() <= 3**0.5 * std
    assert set(weights["layers.0.up.bias"]) == {0.0}
    assert set(weights["final_norm.weight"]) == {1.0}


def test_the_digest_of_an_untrained_encoder_needs_no_torch() -> None:
    code = "import sys, fedbio.encoder, fedbio.weights; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
