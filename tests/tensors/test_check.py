from __future__ import annotations

import numpy as np
import pytest

from fedbio.errors import ProtocolError
from fedbio.tensors import check_matches, chunks, manifest
from fedbio.tensors.check import CheckedReader

F = np.float32


def model(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, F), "b": np.array([1.0], F)}


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


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"w": np.ones(2, F)}, r"site-3: 1 tensor\(s\) missing: 'b'; the model differs from the task's"),
        ({**model(1, 2, 3)}, r"site-3: tensor 'w': float32 \[3\], expected float32 \[2\]"),
        ({**model(1, 2), "w": np.ones(2)}, r"site-3: tensor 'w': float64 \[2\], expected float32 \[2\]"),
        (model(1, float("nan")), "site-3: tensor 'w': value 1 is not finite"),
        (model(float("inf"), float("-inf")), "site-3: tensor 'w': value 0 is not finite"),
    ],
)
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_stream_that_differs_from_the_task_is_refused_by_name(tensors: dict, text: str, size: int) -> None:
    reader = CheckedReader(manifest(model(1, 2)), source="site-3")
    with pytest.raises(ProtocolError, match=text):
        for chunk in chunks(tensors, size):
            list(reader.feed(chunk))


def test_stream_that_matches_is_taken_in_any_order_of_names() -> None:
    tensors = model(1, 2)
    reader = CheckedReader(manifest(tensors))
    pieces = [
        (piece.name, piece.start, piece.values.tolist())
        for chunk in chunks(dict(reversed(tensors.items())), 4)
        for piece in reader.feed(chunk)
    ]
    reader.finish()
    assert pieces == [("b", 0, [1.0]), ("w", 0, [1.0]), ("w", 1, [2.0])]


def test_header_is_refused_before_any_value_has_come() -> None:
    [whole] = chunks(model(1, 2, 3))
    reader = CheckedReader(manifest(model(1, 2)))
    with pytest.raises(ProtocolError, match="expected"):
        list(reader.feed(whole[: 8 + int.from_bytes(whole[:8], "little")]))


def test_malformed_or_short_stream_is_a_protocol_error_of_its_source() -> None:
    reader = CheckedReader({}, source="site-3")
    with pytest.raises(ProtocolError, match="site-3: the stream ended within its header"):
        reader.finish()
    with pytest.raises(ProtocolError, match=r"site-3: header of .* is larger than"):
        list(reader.feed(b"\xff" * 8))
