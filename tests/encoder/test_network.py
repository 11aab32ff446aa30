"""Tests of the network against the published sizes and an independent reference."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from fedbio.encoder import network
from fedbio.encoder.inference import Inference
from fedbio.encoder.network import Encoder, attend, gelu_tanh
from fedbio.encoder.packs import make_plan
from fedbio.weights import ESM1NV, Weights, inference_shapes

from .conftest import TINY, slow_encoder


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_esm1nv_has_exactly_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert parameters(Encoder(ESM1NV, head=True)) == 43_612_544
        assert parameters(Encoder(ESM1NV)) == 43_020_288


def test_network_and_weights_file_agree_on_names_and_shapes() -> None:
    with torch.device("meta"):
        encoder = Encoder(ESM1NV)
    assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == inference_shapes(ESM1NV)


def test_language_model_head_shares_the_token_table() -> None:
    with torch.device("meta"):
        encoder = Encoder(TINY, head=True)
        assert encoder.logits(torch.empty(5, 32)).shape == (5, 128)
    assert [name for name, _ in encoder.named_parameters() if name.startswith("lm_head")] == [
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


def test_gelu_has_a_gradient() -> None:
    x = torch.linspace(-3, 3, 7, requires_grad=True)
    gelu_tanh(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad[-1]) == pytest.approx(1.0119, abs=1e-3)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_one_kernel_for_all_proteins_attends_like_one_product_each(
    monkeypatch: pytest.MonkeyPatch, positions: Literal["learned", "rotary"]
) -> None:
    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, borders_k: Tensor, *longest: int) -> Tensor:
        assert borders.dtype == torch.int32
        assert longest == (7, 7)
        parts = zip(*(each.tensor_split(borders[1:-1].tolist()) for each in (q, k, v)), strict=True)
        return torch.cat([attend(*(each.transpose(0, 1) for each in part)).transpose(0, 1) for part in parts])

    monkeypatch.setattr(network, "varlen_attn", varlen_attn)
    layer = network.Layer(msgspec.structs.replace(TINY, positions=positions))
    runs = [(2, 7), (1, 5), (3, 1)]
    qkv = torch.randn(22, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.flash_attention(qkv, runs), layer.attention(qkv, runs), rtol=0, atol=1e-6)


def test_earlier_layers_come_without_the_final_norm(tiny_weights: Weights) -> None:
    encoder = Encoder(TINY)
    encoder.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tiny_weights.items()})
    tokens, runs = torch.arange(9), [(1, 5), (1, 4)]
    with torch.no_grad():
        x = encoder(tokens, runs, 0)
        torch.testing.assert_close(x[5], encoder.tokens.weight[5] + encoder.positions.weight[0], rtol=0, atol=0)
        for number, layer in enumerate(encoder.layers, start=1):
            x = layer(x, runs)
            if number < 2:
                assert encoder(tokens, runs, number).equal(x)
        assert encoder(tokens, runs, 2).equal(encoder.final_norm(x))
        assert encoder(tokens, runs).equal(encoder.final_norm(x))


def test_training_follows_inference_in_one_process(tiny_weights: Weights) -> None:
    encoder = Encoder(msgspec.structs.replace(TINY, positions="rotary"))
    tokens, runs = torch.arange(9), [(1, 9)]
    with torch.inference_mode():
        encoder(tokens, runs)
    encoder(tokens, runs).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_an_input_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(ValueError, match="a protein of 35 tokens; tiny takes 34"):
        Encoder(TINY)(torch.zeros(35, dtype=torch.long), [(1, 35)])
