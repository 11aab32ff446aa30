from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FormatError
from fedbio.tensors import SCHEMES, LayoutReader, TensorLimits, chunks, manifest, quantized_chunks

MANY = {
    "b": np.arange(3, dtype=np.float32),
    "mask": np.array([True, False, True]),
    "a": np.arange(700, dtype=np.float64).reshape(2, 350),
    "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(7, np.int64),
    "half": np.arange(5, dtype=np.float16),
    "last": np.zeros((3, 0), np.int8),
}


def read(parts: Iterable[bytes | memoryview], **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors that a stream holds, once each piece has been seen to follow the one before it."""
    reader = LayoutReader(**options)
    values: dict[str, list[np.ndarray[Any, Any]]] = {}
    for part in parts:
        for name, start, piece in reader.feed(part):
            assert start == sum(map(len, values.get(name, [])))
            assert piece.flags.aligned
            values.setdefault(name, []).append(piece.copy())
    reader.finish()
    assert reader.specs is not None
    return {
        name: np.concatenate([np.empty(0, dtype), *values.get(name, [])]).reshape(shape)
        for name, (shape, dtype) in reader.specs.items()
    }


def split(whole: bytes, size: int) -> list[bytes]:
    return [whole[begin : begin + size] for begin in range(0, len(whole), size)]


def layout(entries: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 64, 1000, 1 << 20])
def test_tensors_come_out_as_they_went_in_wherever_chunks_end(size: int) -> None:
    tensors = read(split(b"".join(chunks(MANY)), size))
    assert list(tensors) == list(MANY)
    for name, tensor in MANY.items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


def test_specs_are_the_manifest_once_the_header_is_whole() -> None:
    whole = b"".join(chunks(MANY))
    header_bytes = 8 + struct.unpack("<Q", whole[:8])[0]
    reader = LayoutReader()
    assert list(reader.feed(whole[: header_bytes - 1])) == []
    assert reader.specs is None
    assert list(reader.feed(whole[header_bytes - 1 : header_bytes])) == []
    assert reader.specs == manifest(MANY)


def test_whole_aligned_elements_are_views_of_the_chunk() -> None:
    parts = [np.frombuffer(bytes(part), np.uint8) for part in chunks({"x": np.arange(1 << 19, dtype=np.float32)})]
    reader = LayoutReader()
    views = [np.shares_memory(piece.values, part) for part in parts for piece in reader.feed(memoryview(part))]
    assert views == [True, True, True]


def test_model_without_tensors_is_whole_after_its_header() -> None:
    assert read([b"".join(chunks({}))]) == {}


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (b"", "the stream ended within its header, after 0 bytes"),
        (layout({"x": entry()})[:50], "the stream ended within its header, after 50 bytes"),
        (layout({"x": entry()}), "tensor 'x': ends at element 0 of 2; the data are cut short"),
        (layout({"x": entry()}, bytes(7)), "tensor 'x': ends at element 1 of 2; the data are cut short"),
        (layout({"x": entry()}, bytes(9)), " bytes after the last tensor belong to none"),
        (layout({}, bytes(3)), " bytes after the last tensor belong to none"),
        (struct.pack("<Q", 1 << 40), "header of 1099511627776 bytes is larger than the 16777216 allowed"),
        (struct.pack("<Q", 0), "header is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        (layout([1]), "header is not a JSON object"),
        (layout({"x": entry(shape=[-2, -1])}), "tensor 'x': negative dimension in shape [-2, -1]"),
        (layout({"x": entry(shape=[3])}), "tensor 'x': shape [3] of F32 takes 12 bytes, its offsets span 8"),
        (layout({"x": entry(shape=[2**62, 2**62])}), "overflows"),
        (layout({"x": entry(offsets=[8, 16])}), "tensor 'x': offset 8 leaves a hole before it; expected 0"),
        (layout({"x": entry(), "y": entry()}), "tensor 'y': offset 0 overlaps the tensor before it"),
        (layout({"x": entry(dtype="F33")}), "tensor 'x': unknown dtype 'F33'"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_stream_that_is_malformed_is_refused(buffer: bytes, text: str, size: int) -> None:
    with pytest.raises(FormatError) as refused:
        read(split(buffer, size))
    assert text in str(refused.value)


def test_limits_are_those_that_were_given() -> None:
    whole = b"".join(chunks(MANY))
    with pytest.raises(FormatError, match="7 tensors are more than the 6 allowed"):
        read([whole], limits=TensorLimits(max_tensors=6))
    with pytest.raises(FormatError, match="bytes is larger than the 100 allowed"):
        read([whole[:8]], limits=TensorLimits(max_header_bytes=100))


def test_header_that_promises_much_takes_no_memory_before_it_arrives() -> None:
    reader = LayoutReader()
    list(reader.feed(struct.pack("<Q", 16 << 20) + b"{"))
    tracemalloc.start()
    list(reader.feed(b" " * 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_is_one_segment_whatever_the_models_size(scheme: str) -> None:
    model = {"x": np.ones(1 << 23, np.float32)}  # 32 MiB
    parts = [bytes(chunk) for chunk in quantized_chunks(model, scheme)]
    reader = LayoutReader()
    tracemalloc.start()
    for part in parts:
        for piece in reader.feed(part):
            assert piece.values.nbytes <= 1 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_mutated_streams_are_refused_or_keep_to_their_specs() -> None:
    dice = random.Random(7)
    model = {"x": np.linspace(-1, 1, 1030, dtype=np.float32), "y": np.arange(5), "z": np.ones(1100)}
    wholes = [b"".join(quantized_chunks(model, scheme)) for scheme in SCHEMES]
    refused = 0
    for number in range(3000):
        damaged = bytearray(wholes[number % len(wholes)])
        header_bytes = 8 + struct.unpack_from("<Q", damaged)[0]
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(dice.choice([header_bytes, len(damaged)]))] = dice.randrange(256)
        del damaged[len(damaged) - dice.choice([0, 0, 0, 1, 8]) :]
        try:
            tensors = read(split(bytes(damaged), dice.choice([100, 1000, 100_000])))
        except FormatError:
            refused += 1
        else:
            # the narrowest code is half a byte, and it may be widened to float64
            assert sum(tensor.nbytes for tensor in tensors.values()) <= 16 * len(damaged)
    assert refused > 1000
