from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedbio.classifier import CurvePoint, TrainData, evaluate, initialize, train, train_alone

Blobs = Callable[..., TrainData]


def test_alone_is_a_federation_of_one(blobs: Blobs) -> None:
    data, validation = blobs(60), blobs(30, seed=1)
    outcome = train_alone(
        data, validation, hidden=(8,), classes=3, rounds=3, epochs_per_round=2, patience=9, seed=4, learning_rate=0.01
    )
    parameters, accuracies = initialize(16, (8,), 3, seed=4), []
    for number in range(4):
        accuracies.append(evaluate(parameters, validation).accuracy)
        if number == outcome.best_round:
            kept = parameters
        parameters = train(parameters, data, epochs=2, seed=4, round_number=number, learning_rate=0.01).parameters
    assert [point.validation_accuracy for point in outcome.curve] == accuracies
    assert outcome.best_round == accuracies.index(max(accuracies))
    assert all(np.array_equal(kept[name], outcome.parameters[name]) for name in kept)
    assert [point.train_loss is None for point in outcome.curve] == [False, False, False, True]


def test_it_stops_after_patience_rounds_without_a_better_one_and_keeps_the_first_of_equals(blobs: Blobs) -> None:
    easy = blobs(300, spread=0.05)
    points: list[CurvePoint] = []
    outcome = train_alone(
        easy, easy, hidden=(32,), classes=3, rounds=50, patience=4, learning_rate=0.01, on_round=points.append
    )
    first_perfect = next(point.round for point in points if point.validation_accuracy == 1.0)
    assert outcome.best_round == first_perfect
    assert [point.round for point in outcome.curve] == list(range(first_perfect + 5))
    assert points == outcome.curve


def test_without_validation_proteins_the_last_round_is_kept(blobs: Blobs) -> None:
    outcome = train_alone(blobs(30), blobs(0), hidden=(8,), classes=3, rounds=5, patience=2)
    assert outcome.best_round == 5
    assert outcome.curve[-1] == CurvePoint(5, None, None, None)


@pytest.mark.parametrize("count", [1, 2])
def test_a_protein_or_two_are_enough(blobs: Blobs, count: int) -> None:
    outcome = train_alone(blobs(count), blobs(1, seed=1), hidden=(8,), classes=3, rounds=2, patience=2)
    assert len(outcome.curve) == 3
