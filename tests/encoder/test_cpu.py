"""Tests that the encoder as a CPU likes it computes what the plain network does."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from fedbio.encoder import cpu, network
from fedbio.encoder.cpu import CpuEncoder
from fedbio.encoder.network import Encoder
from fedbio.weights import EncoderConfig, inference_shapes

from .conftest import TINY

LONGER = msgspec.structs.replace(TINY, max_tokens=100)
RUNS = [(1, 100), (2, 50), (1, 49), (3, 16), (1, 15), (1, 2)]
TOKENS = torch.from_numpy(np.random.default_rng(1).integers(5, 25, 314))


def encoder(scale: float = 1.0, **changes: Any) -> Encoder:
    """Random weights as wide as a trained model's; `scale` enlarges those of queries and keys."""
    config: EncoderConfig = msgspec.structs.replace(LONGER, **changes)
    random = np.random.default_rng(2)
    network = Encoder(config).requires_grad_(False)
    weights = {}
    for name, shape in inference_shapes(config).items():
        drawn = random.normal(0, 0.3, shape).astype(np.float32) + name.endswith("norm.weight")
        if name.endswith("qkv.weight"):
            drawn[: 2 * config.width] *= scale
        weights[name] = torch.from_numpy(drawn)
    network.load_state_dict(weights)
    return network


@torch.inference_mode()
def run(network: Any, runs: list[tuple[int, int]] = RUNS, layer: int | None = None) -> Tensor:
    result: Tensor = network(TOKENS[: sum(count * length for count, length in runs)], runs, layer)
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rotary", "activation": "gelu", "token_scale": 0.88},
        {"activation": "gelu", "embedding_norm": True},
    ],
    ids=["esm1nv", "esm2", "esm1b"],
)
def test_it_computes_what_the_plain_network_does(changes: dict[str, Any]) -> None:
    plain = encoder(**changes)
    expected = run(plain)
    torch.testing.assert_close(run(CpuEncoder(plain, torch.float32)), expected, rtol=0, atol=1e-5)
    error = (run(CpuEncoder(plain, torch.bfloat16)) - expected).norm() / expected.norm()
    assert error < 0.02
    error = (run(CpuEncoder(plain, torch.float32, int8=True)) - expected).norm() / expected.norm()
    assert error < 0.1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_it_stops_after_any_layer(layer: int) -> None:
    plain = encoder()
    torch.testing.assert_close(
        run(CpuEncoder(plain, torch.float32), layer=layer), run(plain, layer=layer), rtol=0, atol=1e-5
    )


def test_each_model_has_its_own_gelu() -> None:
    # a cosine would not see the difference
    by_tanh, by_error_function = encoder(activation="gelu_tanh"), encoder(activation="gelu")
    expected = run(by_error_function)
    apart = float((run(by_tanh) - expected).norm() / expected.norm())
    assert apart > 1e-5
    for plain in (by_tanh, by_error_function):
        error = (run(CpuEncoder(plain, torch.float32)) - run(plain)).norm() / expected.norm()
        assert error < apart / 10


@pytest.mark.parametrize("scale", [10.0, 40.0])
def test_large_scores_do_not_overflow(scale: float) -> None:
    plain = encoder(scale)
    expected = run(plain)
    error = (run(CpuEncoder(plain, torch.float32)) - expected).norm() / expected.norm()
    assert error < 1e-4  # what rounding of scores in the hundreds leaves
    assert run(CpuEncoder(plain, torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_batched_products_attend_like_the_fused_kernel(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encoder(positions=positions)
    exact = run(plain)
    monkeypatch.setattr(network, "_fused_is_slow", lambda dtype: True)
    monkeypatch.setattr(network, "SCORES_AT_HAND", 3 * 104**2)  # three heads of four at a time
    torch.testing.assert_close(run(CpuEncoder(plain, torch.float32)), exact, rtol=0, atol=1e-5)
    error = (run(CpuEncoder(plain, torch.bfloat16)) - exact).norm() / exact.norm()
    assert error < 0.02


def test_processors_without_tiles_multiply_bfloat16_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    network._fused_is_slow.cache_clear()
    for able, slow in (({"avx512_bf16": True}, True), ({"avx512_bf16": True, "amx_bf16": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert network._fused_is_slow(torch.bfloat16) is slow
        assert not network._fused_is_slow(torch.float32)
        network._fused_is_slow.cache_clear()


def test_a_protein_does_not_depend_on_its_mates() -> None:
    fast = CpuEncoder(encoder(), torch.float32)
    together = run(fast)
    alone = run(fast, [(1, 100)])
    torch.testing.assert_close(together[:100].mean(0), alone.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(run(fast, [(1, 100), (1, 47)])[:100].mean(0), alone.mean(0), rtol=0, atol=1e-6)


def test_small_products_give_what_one_large_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = CpuEncoder(encoder(), torch.float32)
    expected = run(fast)
    monkeypatch.setattr(cpu, "part_tokens", lambda width: 128)  # the last part is a smaller one
    fast = CpuEncoder(encoder(), torch.float32)
    torch.testing.assert_close(run(fast), expected, rtol=0, atol=1e-5)
