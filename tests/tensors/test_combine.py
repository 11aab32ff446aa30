from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedbio.errors import ProtocolError
from fedbio.tensors import check_matches, manifest, weighted_mean

F = np.float32


def model(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, F), "b": np.array([1.0], F)}


def test_mean_is_weighted_and_float32() -> None:
    mean = weighted_mean([("site-2", model(4.0, 8.0), 3), ("site-1", model(0.0, 4.0), 1)])
    assert mean["w"].tolist() == [3.0, 7.0]
    assert mean["b"].tolist() == [1.0]
    assert {tensor.dtype for tensor in mean.values()} == {np.dtype(F)}


def test_mean_is_the_same_bits_in_any_order_of_arrival() -> None:
    dice = np.random.default_rng(0)
    models = [(f"site-{n}", {"w": dice.standard_normal(1_000).astype(F) * 10.0**n}, n + 0.1) for n in range(4)]
    means = {weighted_mean(order)["w"].tobytes() for order in itertools.permutations(models)}
    assert len(means) == 1


def test_one_model_is_its_own_mean_to_the_bit() -> None:
    weights = {"w": np.random.default_rng(1).standard_normal(999).astype(F)}
    np.testing.assert_array_equal(weighted_mean([("site-1", weights, 7.0)])["w"], weights["w"])


def test_large_values_do_not_overflow_on_the_way() -> None:
    top = np.finfo(F).max
    assert weighted_mean([("a", model(top), 1), ("b", model(top), 1)])["w"][0] == top


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ([("a", model(1), 0), ("b", model(1), 0.0)], "the weights of a, b are all zero"),
        ([("a", model(1), -1)], "a: weight -1 is not a finite number >= 0"),
        ([("a", model(1), float("nan"))], "a: weight nan is not a finite number >= 0"),
        ([("a", model(1), float("inf"))], "a: weight inf is not a finite number >= 0"),
        ([("a", model(1), 1), ("b", {"w": np.ones(1, F)}, 1)], "b: tensor 'b' is not in every model"),
        ([("a", model(1), 1), ("b", model(1, 2), 1)], r"b: tensor 'w': shape \[2\], expected \[1\]"),
    ],
)
def test_models_that_do_not_fit_are_refused(models: list, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        weighted_mean(models)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"w": np.ones(2, F)}, r"site-3: 1 tensor\(s\) missing: 'b'; the model differs from the task's"),
        ({**model(1, 2), "x": np.ones(1)}, r"site-3: 1 tensor\(s\) unexpected: 'x'"),
        ({**model(1, 2, 3)}, r"site-3: tensor 'w': float32 \[3\], expected float32 \[2\]"),
        ({**model(1, 2), "w": np.ones(2)}, r"site-3: tensor 'w': float64 \[2\], expected float32 \[2\]"),
        (model(1, float("nan")), "site-3: tensor 'w': 1 of 2 values are not finite"),
        (model(float("inf"), float("-inf")), "site-3: tensor 'w': 2 of 2 values are not finite"),
    ],
)
def test_answer_that_differs_from_the_task_is_refused_by_name(tensors: dict, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        check_matches(tensors, model(1, 2), source="site-3")


def test_answer_that_matches_is_taken_also_when_its_sum_overflows() -> None:
    top = np.finfo(F).max
    check_matches(model(top, top), manifest(model(1, 2)))
