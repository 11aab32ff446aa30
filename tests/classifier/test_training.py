from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedbio.classifier import TrainData, evaluate, initialize, predict, train
from fedbio.classifier.network import Network
from fedbio.errors import DataError

Blobs = Callable[..., TrainData]


def test_training_learns(blobs: Blobs) -> None:
    parameters = initialize(16, (32,), 3, seed=0)
    outcome = train(parameters, blobs(300), epochs=10, seed=0)
    assert evaluate(parameters, blobs(90, seed=1)).accuracy < 0.6
    assert evaluate(outcome.parameters, blobs(90, seed=1)).accuracy > 0.9


def test_same_seed_and_round_give_the_same_bits_and_others_do_not(blobs: Blobs) -> None:
    parameters, data = initialize(16, (32, 8), 3, seed=0), blobs(100)
    torch.manual_seed(1)
    first = train(parameters, data, epochs=2, seed=5, round_number=3)
    torch.manual_seed(2)
    again = train(parameters, data, epochs=2, seed=5, round_number=3)
    next_round = train(parameters, data, epochs=2, seed=5, round_number=4)
    for name, array in first.parameters.items():
        assert array.tobytes() == again.parameters[name].tobytes()
        assert array.tobytes() != next_round.parameters[name].tobytes()
    assert first.loss == again.loss


def test_training_leaves_its_input_and_the_global_random_state_alone(blobs: Blobs) -> None:
    parameters = initialize(16, (8,), 3, seed=0)
    before, state = {name: array.copy() for name, array in parameters.items()}, torch.get_rng_state()
    train(parameters, blobs(40))
    assert all(np.array_equal(before[name], parameters[name]) for name in parameters)
    assert torch.equal(state, torch.get_rng_state())


def test_epochs_in_one_batch_are_steps_of_adamw(blobs: Blobs) -> None:
    parameters, data = initialize(16, (8,), 3, seed=0), blobs(30)
    outcome = train(parameters, data, epochs=5, batch_size=30, learning_rate=0.01, weight_decay=0.1, dropout=0.0)
    layers = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for tensor, array in zip(layers.parameters(), parameters.values(), strict=True):
            tensor.copy_(torch.from_numpy(array))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(layers(torch.from_numpy(data.features)), torch.from_numpy(data.targets))
        loss.backward()
        optimizer.step()
    assert outcome.steps == 5
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
    for tensor, array in zip(layers.parameters(), outcome.parameters.values(), strict=True):
        np.testing.assert_allclose(array, tensor.detach().numpy(), atol=1e-5)


def test_training_does_not_import_the_compiler_of_torch() -> None:
    code = (
        "import sys, numpy as np; from fedbio.classifier import TrainData, initialize, train; "
        "train(initialize(4, (2,), 2, seed=0), TrainData(np.zeros((3, 4), np.float32), np.zeros(3, np.int64))); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (5, 1), (33, 2), (64, 2), (65, 3)])
def test_few_proteins_and_uneven_batches_train(blobs: Blobs, count: int, steps: int) -> None:
    outcome = train(initialize(16, (8,), 3, seed=0), blobs(count), batch_size=32)
    assert outcome.steps == steps
    assert np.isfinite(outcome.loss)


def test_one_class_only_trains(blobs: Blobs) -> None:
    data = TrainData(blobs(40).features, np.full(40, 2, dtype=np.int64))
    outcome = train(initialize(16, (8,), 3, seed=0), data, epochs=20, learning_rate=0.01)
    assert evaluate(outcome.parameters, data).accuracy == 1.0


def test_read_only_features_are_taken(blobs: Blobs) -> None:
    data = blobs(40)
    data.features.flags.writeable = data.targets.flags.writeable = False
    parameters = train(initialize(16, (8,), 3, seed=0), data).parameters
    assert predict(parameters, data.features).shape == (40, 3)


def test_no_protein_another_width_and_divergence_are_refused(blobs: Blobs) -> None:
    parameters = initialize(16, (8,), 3, seed=0)
    with pytest.raises(DataError, match="no protein to train on"):
        train(parameters, blobs(0))
    with pytest.raises(DataError, match="embeddings of width 16 for a classifier that takes 768"):
        train(initialize(768, (8,), 3, seed=0), blobs(10))
    broken = TrainData(np.full((10, 16), np.inf, dtype=np.float32), np.zeros(10, dtype=np.int64))
    with pytest.raises(DataError, match=r"the loss became nan.*lower training\.learning_rate"):
        train(parameters, broken)


def test_dropout_keeps_the_expected_value_and_stops_when_not_training() -> None:
    parameters = initialize(4, (2000,), 1, seed=0)
    network = Network(parameters, dropout=0.25, generator=torch.Generator().manual_seed(0))
    inputs = torch.ones(200, 4)
    exact = network.eval()(inputs)[0].item()
    dropped = network.train()(inputs)
    assert dropped.std() > 0
    assert dropped.mean().item() == pytest.approx(exact, abs=4 * dropped.std().item() / 200**0.5)


def test_probabilities_sum_to_1_and_do_not_depend_on_blocks(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, features = initialize(16, (8,), 3, seed=0), blobs(50).features
    whole = predict(parameters, features)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-6)
    monkeypatch.setattr("fedbio.classifier.inference.BLOCK_ROWS", 7)
    np.testing.assert_allclose(predict(parameters, features), whole, rtol=1e-5)


def test_evaluation_counts_and_its_loss_is_the_mean_cross_entropy(blobs: Blobs) -> None:
    parameters, data = initialize(16, (8,), 3, seed=0), blobs(50)
    evaluation = evaluate(parameters, data)
    logits = Network(parameters).eval()(torch.from_numpy(data.features))
    expected = F.cross_entropy(logits, torch.from_numpy(data.targets)).item()
    assert evaluation.loss == pytest.approx(expected, rel=1e-5)
    assert evaluation.count == evaluation.confusion.sum() == 50
    assert evaluation.correct == np.trace(evaluation.confusion) == round(evaluation.accuracy * 50)


def test_evaluation_of_no_protein_has_count_0(blobs: Blobs) -> None:
    evaluation = evaluate(initialize(16, (8,), 3, seed=0), blobs(0))
    assert (evaluation.correct, evaluation.count) == (0, 0)
    assert np.isnan(evaluation.loss)
