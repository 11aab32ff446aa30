from __future__ import annotations

import numpy as np
import pytest

from fedbio.errors import FormatError
from fedbio.tensors import SCHEMES, ErrorFeedback
from fedbio.tensors.quantize import decode, encode

UPDATE = np.random.default_rng(5).standard_normal((300, 1000)).astype(np.float32)


def received(scheme: str, values: np.ndarray) -> np.ndarray:
    """Return what arrives of a tensor, segment by segment as it travels."""
    flat = values.reshape(-1)
    parts = [flat[start : start + (1 << 18)] for start in range(0, flat.size, 1 << 18)]
    return np.concatenate([decode(scheme, encode(scheme, part).data, part.size) for part in parts]).reshape(
        UPDATE.shape
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sum_of_messages_stays_within_one_messages_error(scheme: str) -> None:
    feedback = ErrorFeedback(scheme)
    total = np.zeros(UPDATE.shape, np.float64)
    for _ in range(20):
        total += received(scheme, feedback.compensate({"x": UPDATE})["x"])
    once = np.linalg.norm(received(scheme, UPDATE) - UPDATE)
    assert np.linalg.norm(total - 20.0 * UPDATE) < 1.5 * once


def test_residual_is_what_was_meant_less_what_arrives() -> None:
    feedback = ErrorFeedback("nf4")
    first = feedback.compensate({"x": UPDATE})["x"]
    assert first is UPDATE
    np.testing.assert_array_equal(feedback.residual["x"], UPDATE - received("nf4", UPDATE))
    residual = feedback.residual["x"].copy()
    np.testing.assert_array_equal(feedback.compensate({"x": UPDATE})["x"], UPDATE + residual)


def test_exact_tensors_are_passed_through() -> None:
    exact = {"small": np.ones(1023, np.float32), "count": np.ones(5000, np.int64)}
    feedback = ErrorFeedback("int8")
    assert all(feedback.compensate(exact)[name] is tensor for name, tensor in exact.items())
    assert feedback.residual == {}


def test_dtype_of_a_tensor_is_kept() -> None:
    feedback = ErrorFeedback("fp4")
    for _ in range(2):
        assert feedback.compensate({"x": UPDATE.astype(np.float64)})["x"].dtype == np.float64
    assert feedback.residual["x"].dtype == np.float32


def test_other_shape_and_value_that_is_not_finite_are_refused_by_name() -> None:
    feedback = ErrorFeedback("fp4")
    feedback.compensate({"x": UPDATE})
    with pytest.raises(FormatError, match=r"tensor 'x': shape \[300000\], last time \[300, 1000\]"):
        feedback.compensate({"x": UPDATE.reshape(-1)})
    with pytest.raises(FormatError, match="tensor 'y': some values are not finite"):
        feedback.compensate({"y": np.full(2000, np.nan, np.float32)})
