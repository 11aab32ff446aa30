from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from fedbio.errors import ProtocolError
from fedbio.tensors import weighted_mean
from fedbio.tensors.combine import BLOCK_VALUES

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


def test_products_are_taken_in_float64() -> None:
    third = np.array([1.0, 0.1], F) / F(3)
    mean = weighted_mean([("a", {"w": third}, 1), ("b", {"w": third}, 6)])["w"]
    wide = third.astype(np.float64)
    assert mean.tolist() == (wide * (1 / 7) + wide * (6 / 7)).astype(F).tolist()


def test_blocks_leave_no_trace_in_a_long_or_strided_tensor() -> None:
    dice = np.random.default_rng(2)
    wide = [dice.standard_normal((3, BLOCK_VALUES)).astype(dtype) for dtype in (F, np.float64, np.float16)]
    parts = {"a": 0.2, "b": 0.3, "c": 0.5}
    expected = sum(each.astype(np.float64) * part for each, part in zip(wide, parts.values(), strict=True)).astype(F)
    mean = weighted_mean([(name, {"w": w.T}, part) for (name, part), w in zip(parts.items(), wide, strict=True)])
    np.testing.assert_array_equal(mean["w"], expected.T)


def test_memory_beyond_the_mean_does_not_grow_with_the_model() -> None:
    models = [(name, {"w": np.ones(8 << 20, F)}, 1) for name in "ab"]
    tracemalloc.start()
    weighted_mean(models)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (32 << 20) + (2 << 20)


def test_a_name_that_comes_twice_is_a_bug() -> None:
    with pytest.raises(ValueError, match="two models have one name"):
        weighted_mean([("a", model(1), 1), ("a", model(1), 1)])
