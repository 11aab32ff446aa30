"""Tests that the training pass is the encoder's own, forth and back, and that proteins of a pack do not meet."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedbio.encoder.network import Encoder
from fedbio.encoder.pretraining import attention
from fedbio.encoder.pretraining.forward import hidden_states, masked_logits
from fedbio.weights import EncoderConfig

from .conftest import TINY

MASK = 4
KINDS = {
    "esm1nv": TINY,
    "exact GELU": msgspec.structs.replace(TINY, activation="gelu"),
    "rotary": msgspec.structs.replace(TINY, positions="rotary", activation="gelu"),
    "norm after the embedding": msgspec.structs.replace(TINY, embedding_norm=True),
}
RUNS = [(3, 9), (1, 12), (2, 40)]


def network_of(config: EncoderConfig) -> Encoder:
    torch.manual_seed(3)
    network = Encoder(config, head=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return network


def tokens_of(runs: list[tuple[int, int]], seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(4, 25, sum(count * length for count, length in runs)))


@pytest.mark.parametrize("kind", KINDS)
def test_states_logits_and_gradients_are_those_of_the_network(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_BYTES", 20_000)  # several portions in a run
    network = network_of(KINDS[kind])
    tokens, places = tokens_of(RUNS), torch.tensor([1, 5, 20, 70, 118])
    results = []
    for ours in (False, True):
        network.zero_grad()
        if ours:
            hidden = hidden_states(network, tokens, RUNS, mask=MASK)
            logits = masked_logits(network, hidden, places)
        else:
            hidden = network(tokens, RUNS)
            logits = network.logits(hidden)[places]
        F.cross_entropy(logits, tokens[places]).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}  # type: ignore[union-attr]
        results.append((hidden.detach(), logits.detach(), gradients))
    (hidden, logits, gradients), (our_hidden, our_logits, our_gradients) = results
    torch.testing.assert_close(our_hidden, hidden, rtol=0, atol=2e-5)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=2e-5)
    for name, gradient in gradients.items():
        # sums in another order; a wrong formula is off by the gradient itself
        assert torch.linalg.vector_norm(our_gradients[name] - gradient) <= 1e-4 * torch.linalg.vector_norm(gradient), (
            name
        )


def test_proteins_of_a_pack_do_not_see_each_other() -> None:
    network = network_of(TINY)
    mine = tokens_of([(1, 12)], seed=1)
    alone = hidden_states(network, mine, [(1, 12)], mask=MASK)
    for seed in (2, 3):
        mates = tokens_of([(5, 9), (2, 12), (1, 30)], seed=seed)
        runs = [(5, 9), (3, 12), (1, 30)]
        pack = torch.cat([mates[:45], mates[45:57], mine, mates[57:]])
        found = hidden_states(network, pack, runs, mask=MASK)[57:69]
        torch.testing.assert_close(found, alone, rtol=0, atol=2e-6)


def test_a_loss_on_one_protein_moves_no_token_of_another() -> None:
    network = network_of(TINY)
    tokens = tokens_of([(2, 10)])
    tokens[:10], tokens[10:] = torch.randint(5, 12, (10,)), torch.randint(15, 20, (10,))
    hidden_states(network, tokens, [(2, 10)], mask=MASK)[:10].sum().backward()
    moved = network.tokens.weight.grad.abs().sum(1)  # type: ignore[union-attr]
    assert moved[15:20].max() == 0
    assert moved[tokens[:10]].min() > 0


def test_masked_tokens_of_a_model_with_token_dropout_are_zero() -> None:
    network = network_of(msgspec.structs.replace(TINY, token_scale=0.88))
    tokens = tokens_of([(1, 12)])
    tokens[3] = MASK
    before = hidden_states(network, tokens, [(1, 12)], mask=MASK).detach()
    with torch.no_grad():
        network.tokens.weight[MASK] += 1
    torch.testing.assert_close(hidden_states(network, tokens, [(1, 12)], mask=MASK).detach(), before)


def test_bfloat16_stays_near_float32() -> None:
    network = network_of(TINY)
    tokens = tokens_of(RUNS)
    exact = hidden_states(network, tokens, RUNS, mask=MASK)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    rough = hidden_states(network, tokens, RUNS, mask=MASK)
    assert rough.dtype == torch.bfloat16
    cosines = torch.cosine_similarity(rough.float(), exact, dim=1)
    assert cosines.min() > 0.998
