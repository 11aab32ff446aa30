from __future__ import annotations

import json
import random
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedbio.errors import FormatError
from fedbio.tensors import TensorLimits, chunks, encoded_size, header, parse

MANY = {
    "b": np.arange(3, dtype=np.float32),
    "a": np.arange(700_000, dtype=np.float64).reshape(2, 350_000),
    "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(7, np.int64),
    "half": np.arange(5, dtype=np.float16),
    "mask": np.array([True, False, True]),
    "ünïcode": np.arange(4, dtype=np.uint8),
}


def layout(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_small_tensors_have_the_documented_bytes() -> None:
    assert b"".join(chunks({"xy": np.array([1.0, 2.0], np.float32)})) == (
        b'8\x00\x00\x00\x00\x00\x00\x00{"xy":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        b" \x00\x00\x80?\x00\x00\x00@"
    )


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_chunks_have_the_size_asked_for_and_join_to_the_whole(size: int) -> None:
    tensors = {name: tensor for name, tensor in MANY.items() if size > 7 or name != "a"}
    pieces = [bytes(chunk) for chunk in chunks(tensors, size)]
    assert {len(piece) for piece in pieces[:-1]} <= {size}
    assert 0 < len(pieces[-1]) <= size
    assert sum(map(len, pieces)) == encoded_size(tensors)
    assert b"".join(pieces) == b"".join(chunks(tensors))


def test_large_tensor_is_passed_through_without_a_copy() -> None:
    tensor = np.zeros(3 << 20, np.uint8)
    views = [np.frombuffer(chunk, np.uint8) for chunk in chunks({"x": tensor})]
    assert sum(np.shares_memory(view, tensor) for view in views) == 2


def test_the_safetensors_library_reads_what_we_write() -> None:
    read = load(b"".join(bytes(chunk) for chunk in chunks(MANY)))
    assert read.keys() == MANY.keys()
    for name, tensor in MANY.items():
        np.testing.assert_array_equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_we_read_what_the_safetensors_library_writes() -> None:
    read = parse(save(MANY, metadata={"made by": "someone"}))
    assert read.keys() == MANY.keys()
    for name, tensor in MANY.items():
        np.testing.assert_array_equal(read[name], tensor)
        assert read[name].shape == tensor.shape


def test_parsed_arrays_are_views_where_aligned_and_right_where_not() -> None:
    whole = np.frombuffer(b"".join(bytes(chunk) for chunk in chunks(MANY)), np.uint8)
    read = parse(memoryview(whole))
    assert np.shares_memory(read["a"], whole) == (read["a"].base is not None)
    assert np.shares_memory(read["b"], whole)
    assert all(tensor.flags.aligned for tensor in read.values())
    for offset in range(1, 8):
        moved = np.concatenate([np.zeros(offset, np.uint8), whole])[offset:]
        np.testing.assert_array_equal(parse(memoryview(moved))["b"], MANY["b"])


def test_views_that_are_not_contiguous_or_not_little_endian_are_written_right() -> None:
    strided, big = np.arange(12, dtype=np.float32).reshape(3, 4).T, np.arange(3, dtype=">i4")
    read = parse(b"".join(bytes(chunk) for chunk in chunks({"s": strided, "b": big})))
    np.testing.assert_array_equal(read["s"], strided)
    np.testing.assert_array_equal(read["b"], [0, 1, 2])


def test_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(FormatError, match="tensor 'z' of complex128 cannot be stored; dtypes are BOOL, U8"):
        header({"z": np.zeros(1, np.complex128)})


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (b"", "0 bytes are too few for a safetensors header"),
        (struct.pack("<Q", 1 << 40), "header of 1099511627776 bytes is larger than the 16777216 allowed"),
        (struct.pack("<Q", 100) + b"{}", "header of 100 bytes is cut short; only 2 bytes follow"),
        (layout(b"\xff\xfe{}"), "header is not UTF-8 text"),
        (layout(b'{"x":'), "header is not valid JSON: Expecting value: line 1 column 6 (char 5)"),
        (layout(b"[" * 100_000), "header is not valid JSON: "),
        (layout(b"[1]"), "header is not a JSON object"),
        (
            layout(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}'),
            "header names 'x' twice",
        ),
        (
            layout({"__metadata__": {"a": 1}}),
            "tensor '__metadata__': malformed header entry: Expected `str`, got `int`",
        ),
        (layout({"x": 3}), "tensor 'x': malformed header entry: Expected `object`, got `int`"),
        (layout({"x": {"dtype": "F32"}}), "tensor 'x': malformed header entry: Object missing required field `shape`"),
        (layout({"x": entry(shape=[2.5])}), "tensor 'x': malformed header entry: Expected `int`, got `float`"),
        (layout({"x": entry(shape=[True])}), "tensor 'x': malformed header entry: Expected `int`, got `bool`"),
        (layout({"x": entry(offsets=[0, 1, 2])}), "tensor 'x': malformed header entry: Expected `array` of length 2"),
        (layout({"x": entry(dtype="F33")}), "tensor 'x': unknown dtype 'F33'; known are BOOL, U8, I8"),
        (layout({"x": entry(shape=[1] * 17)}), "tensor 'x': 17 dimensions, at most 16 are allowed"),
        (layout({"x": entry(shape=[-2, -1])}), "tensor 'x': negative dimension in shape [-2, -1]"),
        (layout({"x": entry(offsets=[8, 0])}), "tensor 'x': offsets 8 to 0 are not a range"),
        (layout({"x": entry(offsets=[-8, 0])}), "tensor 'x': offsets -8 to 0 are not a range"),
        (layout({"x": entry(shape=[2**62, 2**62])}), "tensor 'x': shape [4611686018427387904, 4611686018427387904]"),
        (layout({"x": entry(shape=[0, 2**80], offsets=[0, 0])}), "overflows"),
        (layout({"x": entry(shape=[3])}, bytes(8)), "tensor 'x': shape [3] of F32 takes 12 bytes, its offsets span 8"),
        (layout({"x": entry()}, bytes(7)), "tensor 'x': ends at byte 8 of 7; the data are cut short"),
        (layout({"x": entry(offsets=[8, 16])}, bytes(16)), "tensor 'x': offset 8 leaves a hole before it; expected 0"),
        (
            layout({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
            "tensor 'y': offset 4 overlaps the tensor before it; expected 8",
        ),
        (layout({"x": entry(), "y": entry()}, bytes(8)), "tensor 'y': offset 0 overlaps the tensor before it"),
        (layout({"x": entry()}, bytes(9)), "1 bytes after the last tensor belong to none"),
    ],
)
def test_each_way_to_be_malformed_has_its_own_text(buffer: bytes, text: str) -> None:
    with pytest.raises(FormatError) as refused:
        parse(buffer)
    assert text in str(refused.value)


def test_too_many_tensors_are_refused() -> None:
    buffer = layout({str(number): entry(shape=[0], offsets=[0, 0]) for number in range(11)})
    with pytest.raises(FormatError, match="11 tensors are more than the 10 allowed"):
        parse(buffer, limits=TensorLimits(max_tensors=10))


def test_mutated_buffers_are_refused_or_keep_names_and_shapes_in_bounds() -> None:
    dice = random.Random(3)
    small = {name: tensor for name, tensor in MANY.items() if name != "a"}
    whole = b"".join(bytes(chunk) for chunk in chunks(small))
    refused = 0
    for _ in range(5_000):
        damaged = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        del damaged[len(damaged) - dice.choice([0, 0, 0, 1, 8]) :]
        try:
            read = parse(bytes(damaged))
        except FormatError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in read.values()) <= len(damaged)
    assert refused > 2_000
