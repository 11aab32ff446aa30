from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from fedbio.classifier.metrics import accuracy, confusion_matrix, f1_per_class, macro_f1, mcc


@pytest.mark.parametrize("seed", range(5))
def test_measures_agree_with_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    # class 9 never occurs and is never predicted, class 8 is only predicted, class 0 never predicted
    true, predicted = random.integers(0, 8, 200), random.integers(1, 9, 200)
    confusion = confusion_matrix(true, predicted, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert confusion.tolist() == reference.confusion_matrix(true, predicted, labels=range(10)).tolist()
        assert accuracy(confusion) == pytest.approx(reference.accuracy_score(true, predicted))
        assert macro_f1(confusion) == pytest.approx(reference.f1_score(true, predicted, average="macro"))
        expected = reference.f1_score(true, predicted, average=None, labels=range(9))
    np.testing.assert_allclose(f1_per_class(confusion)[:9], expected)
    assert math.isnan(f1_per_class(confusion)[9])
    assert mcc(confusion) == pytest.approx(reference.matthews_corrcoef(true, predicted))


def test_measures_of_a_small_example() -> None:
    confusion = confusion_matrix(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0]), 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert accuracy(confusion) == pytest.approx(4 / 6)
    np.testing.assert_allclose(f1_per_class(confusion), [2 / 3, 0.8, 0.0, np.nan])
    assert macro_f1(confusion) == pytest.approx((2 / 3 + 0.8) / 3)


def test_correlation_is_0_if_one_class_is_predicted_for_all() -> None:
    assert mcc(confusion_matrix(np.array([0, 1, 2]), np.array([1, 1, 1]), 3)) == 0.0


def test_correlation_is_exact_for_counts_beyond_64_bits() -> None:
    assert mcc(np.array([[3 * 10**9, 0], [0, 10**9]])) == 1.0


def test_without_a_protein_measures_are_nan() -> None:
    empty = np.zeros((3, 3), dtype=np.int64)
    assert all(math.isnan(measure(empty)) for measure in (accuracy, macro_f1, mcc))
