"""Tests of the network against the published sizes and an independent reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbio.encoder.inference import Inference
from fedbio.encoder.network import Encoder, gelu_tanh
from fedbio.encoder.packs import make_plan
from fedbio.weights import ESM1NV, Weights, inference_shapes

from .conftest import TINY, slow_encoder


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_esm1nv_has_exactly_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert parameters(Encoder(ESM1NV, head=True)) == 43_612_544
        assert parameters(Encoder(ESM1NV)) == 43_020_288


def test_network_and_weights_file_agree_on_names_and_shapes() -> None:
    with torch.device("meta"):
        network = Encoder(ESM1NV)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == inference_shapes(ESM1NV)


def test_language_model_head_shares_the_token_table() -> None:
    with torch.device("meta"):
        network = Encoder(TINY, head=True)
        assert network.logits(torch.empty(5, 32)).shape == (5, 128)
    assert [name for name, _ in network.named_parameters() if name.startswith("lm_head")] == [
        "lm_head.bias",
        "lm_head.dense.weight",
        "lm_head.dense.bias",
        "lm_head.norm.weight",
        "lm_head.norm.bias",
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_packed_proteins_equal_the_slow_reference_one_by_one(
    tiny_weights: Weights, dtype: torch.dtype, tolerance: float
) -> None:
    sequences = [b"MKVLAAGIVGLCAKAYWTPQDENRHFSUOBZX", b"ACDEF", b"GHIKL", b"M"]
    inference = Inference(TINY, tiny_weights, device=torch.device("cpu"), dtype=dtype, threads=1)
    plan = make_plan([len(residues) for residues in sequences], max_residues=32, windows=False, budget=1000)
    sums = inference.pack(sequences, plan, 0)
    assert sums.shape == (4, 32)
    assert sums.dtype == np.float32
    for row, protein in zip(sums, plan.protein.tolist(), strict=True):
        tokens = np.array([1, *inference._alphabet.encode(sequences[protein]), 2])
        expected = slow_encoder(TINY, tiny_weights, tokens)[1:-1].mean(axis=0)
        np.testing.assert_allclose(row / len(sequences[protein]), expected, rtol=0, atol=tolerance)


def test_fast_gelu_is_the_tanh_approximation_and_not_the_error_function() -> None:
    x = torch.linspace(-6, 6, 1001)
    with torch.no_grad():
        fast = gelu_tanh(x.clone())
    torch.testing.assert_close(fast, torch.nn.functional.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)
    assert float((fast - torch.nn.functional.gelu(x)).abs().max()) > 1e-4


def test_gelu_has_a_gradient() -> None:
    x = torch.linspace(-3, 3, 7, requires_grad=True)
    gelu_tanh(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad[-1]) == pytest.approx(1.0119, abs=1e-3)


def test_an_input_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(ValueError, match="a protein of 35 tokens; tiny takes 34"):
        Encoder(TINY)(torch.zeros(35, dtype=torch.long), [(1, 35)])
