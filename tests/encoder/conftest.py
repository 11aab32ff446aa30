"""A reference that shares no code with the encoder, and proteins to try it on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedbio.weights import EncoderConfig, Weights, inference_shapes

TINY = EncoderConfig(name="tiny", trained=True, layers=2, heads=4, width=32, ffn=64, max_tokens=34)

WriteFasta = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A second thread on a busy machine slows such small networks down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_weights() -> Weights:
    """Random weights of `TINY`, large enough that every part of the network matters."""
    random = np.random.default_rng(7)
    return {name: random.normal(0.1, 0.3, shape).astype(np.float32) for name, shape in inference_shapes(TINY).items()}


@pytest.fixture
def write_fasta(tmp_path: Path) -> WriteFasta:
    """Write random proteins of given lengths, named p0, p1, ..., and return the file."""

    def write(lengths: list[int], name: str = "proteins.fasta", seed: int = 0) -> Path:
        random = np.random.default_rng(seed)
        path = tmp_path / name
        path.write_text(
            "".join(
                f">p{number}\n{''.join(random.choice(list('ACDEFGHIKLMNPQRSTVWY'), length))}\n"
                for number, length in enumerate(lengths)
            )
        )
        return path

    return write


def slow_encoder(config: EncoderConfig, weights: Weights, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """ESM-1nv as its specification says it, one protein at a time, in float64 NumPy: (L,) -> (L, D)."""

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ weights[f"{name}.weight"].T.astype(np.float64) + weights[f"{name}.bias"]

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    size = config.width // config.heads
    x = weights["tokens.weight"][tokens].astype(np.float64) + weights["positions.weight"][: len(tokens)]
    for layer in range(config.layers):
        name = f"layers.{layer}"
        q, k, v = np.split(linear(norm(x, f"{name}.attention_norm"), f"{name}.qkv"), 3, axis=-1)
        mixed = np.empty_like(q)
        for head in range(config.heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
        x = x + linear(mixed, f"{name}.out")
        u = linear(norm(x, f"{name}.ffn_norm"), f"{name}.up")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"{name}.down")
    return norm(x, "final_norm")
