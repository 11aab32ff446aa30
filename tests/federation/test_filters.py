from __future__ import annotations

import numpy as np
import pytest

from fedbio.federation import Chain, ClipNorm, ExcludeParameters, FLModel


@pytest.fixture
def model() -> FLModel:
    return FLModel(params={"a": np.array([3.0, 0.0], np.float32), "b": np.array([[4.0]], np.float32)})


def test_excluded_parameters_are_held_back_in_their_tasks_only(model: FLModel) -> None:
    exclude = ExcludeParameters(["a*"], tasks=("train",))
    assert set(exclude(model, task="train").params) == {"b"}
    assert exclude(model, task="publish") is model
    assert set(model.params) == {"a", "b"}


def test_norm_is_clipped_over_all_parameters_together(model: FLModel) -> None:
    clipped = ClipNorm(2.5)(model, task="train")
    assert clipped.params["a"].tolist() == [1.5, 0.0]
    assert clipped.params["b"].tolist() == [[2.0]]
    assert clipped.params["a"].dtype == np.float32
    assert ClipNorm(5.0)(model, task="train") is model


def test_norm_of_huge_parameters_does_not_overflow() -> None:
    huge = FLModel(params={"a": np.full(4, 1e30, np.float32)})
    np.testing.assert_allclose(ClipNorm(1.0)(huge, task="train").params["a"], 0.5, rtol=1e-6)


def test_chain_applies_filters_in_order(model: FLModel) -> None:
    chain = Chain([ExcludeParameters(["b"]), ClipNorm(1.0)])
    assert chain(model, task="train").params["a"].tolist() == [1.0, 0.0]
    assert Chain()(model, task="train") is model
