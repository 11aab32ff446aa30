"""Tests of an update: what it learns, what it leaves, and that it goes on from a state as if nothing had been."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch

from fedbio.encoder.pretraining.batches import Batch, make_batch
from fedbio.encoder.pretraining.beginning import first_weights
from fedbio.encoder.pretraining.learner import Learner
from fedbio.encoder.pretraining.masking import STANDARD, Masker
from fedbio.encoder.pretraining.recipe import PRESETS, Recipe, learning_rate, settled_steps
from fedbio.errors import FormatError, MachineError
from fedbio.weights import ESM1NV, EncoderConfig, weights_digest

from .conftest import TINY, learner_of

MASKER = Masker("esm1nv", share=0.15, mask_token_share=0.8, random_share=0.1)
RECIPE = Recipe(steps=20, warmup_steps=2, learning_rate=3e-3, average="none", dtype="float32")


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    letters = np.frombuffer("".join(random.choice(list(STANDARD), sum(lengths))).encode(), dtype=np.uint8)
    begins = np.cumsum(lengths) - lengths
    return make_batch(letters, begins, lengths, "esm1nv", MASKER, random)


def test_the_presets_are_of_the_promised_size() -> None:
    counts = {
        name: sum(tensor.size for tensor in first_weights(preset.config, 0).values())
        for name, preset in PRESETS.items()
    }
    assert counts == {"esm1nv-44m": 43_612_544, "esm1nv-mini": 4_969_344}
    assert PRESETS["esm1nv-44m"].config == ESM1NV.__class__(name="esm1nv-44m")


def test_an_untrained_model_knows_nothing_of_the_vocabulary() -> None:
    learner = learner_of(RECIPE)
    loss, masked = learner.evaluate(batch_of([60] * 40))
    # tiny random logits over 128 rows
    assert loss / masked == pytest.approx(math.log(128), abs=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_few_proteins_are_learnt_by_heart(dtype: str, optimizer: str) -> None:
    recipe = Recipe(steps=250, warmup_steps=10, learning_rate=1e-2, weight_decay=0.0, average="none")
    learner = learner_of(msgspec.structs.replace(recipe, dtype=dtype, optimizer=optimizer))
    batch = batch_of([30, 30, 40])
    losses = []
    for _ in range(recipe.steps):
        learner.add(batch)
        losses.append(learner.update().loss)
    assert losses[0] > 4.5
    assert losses[-1] < 0.2


def test_batches_added_up_are_one_large_batch() -> None:
    parts = [batch_of([20, 20], seed=1), batch_of([50], seed=2)]
    one, two = learner_of(RECIPE), learner_of(RECIPE)
    joined = Batch(
        torch.cat([part.tokens for part in parts]),
        [*parts[0].runs, *parts[1].runs],
        torch.cat([parts[0].places, parts[1].places + len(parts[0].tokens)]),
        torch.cat([part.targets for part in parts]),
    )
    for _ in range(3):
        one.add(joined)
        for part in parts:
            two.add(part)
        first, second = one.update(), two.update()
        assert first.masked == second.masked
        assert first.loss == pytest.approx(second.loss, rel=1e-5)
        assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-4)


def test_a_gradient_is_clipped_and_its_length_told() -> None:
    """AdamW's first moment after one update is a tenth of the clipped gradient."""
    learner = learner_of(msgspec.structs.replace(RECIPE, clip=0.01))
    learner.add(batch_of([40] * 3))
    update = learner.update()
    assert update.gradient_norm > 0.1
    vectors, _ = learner.state()
    assert float(torch.linalg.vector_norm(vectors["mean"])) == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_muon_moves_each_matrix_by_a_nearly_orthogonal_one() -> None:
    """The first step against the paper's: the singular values of the gradient go through its polynomial five times."""
    recipe = msgspec.structs.replace(RECIPE, weight_decay=0.0, warmup_steps=0)
    adamw, muon = learner_of(recipe), learner_of(msgspec.structs.replace(recipe, optimizer="muon"))
    before = muon.weights()
    for learner in (adamw, muon):
        learner.add(batch_of([40] * 10))
        learner.update()
    after = muon.weights()
    # AdamW's first moment after one update is the gradient but for a factor, and matrices come first
    gradient, done = adamw.state()[0]["mean"].double().numpy(), 0
    matrices = [name for name, module in adamw.network.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in (f"{module}.weight" for module in matrices):
        shape = before[name].shape
        whole = gradient[done : done + before[name].size].reshape(shape)
        done += whole.size
        pieces = 3 if name.endswith("qkv.weight") else 1  # queries, keys and values are three matrices
        for found, part in zip(np.split(after[name] - before[name], pieces), np.split(whole, pieces), strict=True):
            left, values, right = np.linalg.svd(part, full_matrices=False)
            values /= np.linalg.norm(values)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            expected = -recipe.learning_rate * 0.2 * math.sqrt(max(part.shape)) * (left * values @ right)
            assert np.linalg.norm(found - expected) < 0.4 * np.linalg.norm(expected), (
                name
            )  # the iterations are in bfloat16


def test_muon_asks_for_a_pytorch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MachineError, match=r"install 2\.9 or later, or train with --optimizer adamw"):
        learner_of(msgspec.structs.replace(RECIPE, optimizer="muon"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_matrices_of_linear_maps_decay(optimizer: str) -> None:
    recipe = msgspec.structs.replace(RECIPE, weight_decay=0.5, learning_rate=0.1, warmup_steps=0, optimizer=optimizer)
    learner = learner_of(recipe)
    before = learner.weights()
    learner.update()  # a gradient of zero: only decay is left
    after = learner.weights()
    for name in before:
        linear = name.endswith(".weight") and "norm" not in name and name not in ("tokens.weight", "positions.weight")
        np.testing.assert_allclose(after[name], before[name] * (0.95 if linear else 1.0), rtol=1e-6, err_msg=name)


def test_the_rate_rises_and_falls_as_told() -> None:
    recipe = Recipe(steps=110, warmup_steps=10, learning_rate=1.0, final_share=0.1)
    rates = [learning_rate(recipe, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert all(rates[k] > rates[k + 1] for k in range(10, 109))


def test_the_rate_stays_level_until_the_last_part_of_the_schedule() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, learning_rate=1.0, final_share=0.1, decay_share=0.2, average="none")
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.55)
    assert all(rates[k] > rates[k + 1] for k in range(80, 99))
    assert settled_steps(recipe) == 80
    longer = msgspec.structs.replace(recipe, steps=1000)
    assert [learning_rate(longer, step) for step in range(81)] == rates[:81]


def test_a_mean_over_the_tail_may_begin_before_the_rate_falls() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, decay_share=0.2, average="tail", average_share=0.3)
    assert settled_steps(recipe) == 70


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    learner = learner_of(RECIPE)
    before = weights_digest(learner.weights())
    learner.add(batch_of([20]))
    learner._gradient[7] = float("inf")
    with pytest.raises(MachineError, match="step 0: the loss or its gradient is no longer finite"):
        learner.update()
    assert weights_digest(learner.weights()) == before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("average", ["none", "ema", "tail"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_goes_on_bit_for_bit(average: str, dtype: str, optimizer: str) -> None:
    recipe = msgspec.structs.replace(RECIPE, average=average, average_share=0.5, dtype=dtype, optimizer=optimizer)
    batches = [batch_of([30, 30], seed=seed) for seed in range(20)]

    def learn(learner: Learner, part: list[Batch]) -> None:
        for batch in part:
            learner.add(batch)
            learner.update()

    whole = learner_of(recipe)
    learn(whole, batches)
    for stop in (3, 14):
        broken = learner_of(recipe)
        learn(broken, batches[:stop])
        vectors, numbers = broken.state()
        other = learner_of(msgspec.structs.replace(recipe, seed=5))
        other.restore({name: vector.clone() for name, vector in vectors.items()}, numbers)
        learn(other, batches[stop:])
        assert weights_digest(other.weights()) == weights_digest(whole.weights())


def test_the_tail_is_the_mean_of_the_last_weights() -> None:
    recipe = msgspec.structs.replace(RECIPE, steps=10, average="tail", average_share=0.3)
    learner = learner_of(recipe)
    seen = []
    for seed in range(10):
        learner.add(batch_of([30], seed=seed))
        learner.update()
        seen.append(learner.state()[0]["values"].clone())
    expected = torch.stack(seen[-3:]).mean(0)
    torch.testing.assert_close(learner.state()[0]["average"], expected)
    with learner.averaged():
        torch.testing.assert_close(learner.state()[0]["values"], expected)
    assert learner.state()[0]["values"].equal(seen[-1])


def test_a_state_of_another_network_is_refused() -> None:
    vectors, numbers = learner_of(RECIPE).state()
    other = learner_of(RECIPE, EncoderConfig(layers=1, heads=2, width=32, ffn=64, max_tokens=66))
    with pytest.raises(FormatError, match="another network"):
        other.restore(vectors, numbers)


def test_it_goes_on_from_an_encoder_without_a_head() -> None:
    weights = {name: tensor for name, tensor in first_weights(TINY, 3).items() if not name.startswith("lm_head.")}
    learner = Learner(TINY, weights, RECIPE, device=torch.device("cpu"))
    found = learner.weights()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)
    assert found["lm_head.dense.weight"].std() == pytest.approx(0.02, rel=0.1)
