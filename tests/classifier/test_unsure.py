from __future__ import annotations

import numpy as np

from fedbio.classifier import choose_threshold, confidence_counts
from fedbio.classifier.unsure import is_unsure, meaning


def _probabilities(tops: list[float]) -> np.ndarray:
    tops32 = np.array(tops, dtype=np.float32)
    return np.stack([tops32, 1 - tops32], axis=1)


def test_threshold_is_the_lowest_above_which_four_of_five_are_right() -> None:
    # ten proteins at 0.9, nine of them right; ten at 0.7, seven right; ten at 0.55, none right
    probabilities = _probabilities([0.9] * 10 + [0.7] * 10 + [0.55] * 10)
    targets = np.array([0] * 9 + [1] + [0] * 7 + [1] * 3 + [1] * 10)
    counts = confidence_counts(probabilities, targets)
    assert counts.shape == (2, 50)
    assert counts.sum(axis=1).tolist() == [30, 16]
    # 16 of the 20 at 0.7 and more are right; the bin of 0.55 begins at 0.54
    assert choose_threshold(counts) == 0.56
    assert is_unsure(probabilities, 0.56).tolist() == [False] * 20 + [True] * 10


def test_counts_of_sites_add_up() -> None:
    probabilities, targets = _probabilities([0.9, 0.8, 0.6, 0.6]), np.array([0, 0, 1, 0])
    parts = [confidence_counts(probabilities[part], targets[part]) for part in (slice(1), slice(1, 4))]
    assert np.array_equal(parts[0] + parts[1], confidence_counts(probabilities, targets))


def test_a_model_that_is_never_right_enough_is_always_unsure() -> None:
    probabilities = _probabilities([1.0] * 20)
    threshold = choose_threshold(confidence_counts(probabilities, np.array([0] * 10 + [1] * 10)))
    assert threshold == 1.0
    assert is_unsure(probabilities, threshold).all()


def test_a_few_validation_proteins_prove_nothing() -> None:
    probabilities = _probabilities([0.9] * 9)
    assert choose_threshold(confidence_counts(probabilities, np.zeros(9, dtype=np.int64))) == 1.0


def test_a_model_that_is_always_right_is_never_unsure() -> None:
    probabilities = _probabilities([0.6] * 10)
    assert choose_threshold(confidence_counts(probabilities, np.zeros(10, dtype=np.int64))) == 0.0


def test_the_flag_is_explained() -> None:
    assert meaning(1.0) == (
        "all are flagged: the model has no threshold above which at least 80% of 10 or more validation proteins were "
        "predicted correctly"
    )
    assert meaning(0.56).startswith("the highest probability is below 0.56; ")
