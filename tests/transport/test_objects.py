"""Object streams: what comes out is what went in, and what is malformed is refused before memory is taken."""

from __future__ import annotations

import collections
import contextlib
import struct
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedbio.errors import FormatError
from fedbio.tensors.layout import DTYPES
from fedbio.transport import ObjectPayload
from fedbio.transport.objects import CHUNK_BYTES, ObjectReader, object_chunks
from fedbio.transport.sharing import KEPT_CHUNKS

named = st.lists(
    st.tuples(
        st.text(max_size=20),
        st.sampled_from(list(DTYPES.values())).flatmap(
            lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
        ),
    ),
    max_size=6,
)


def announced(name: Any, dtype: Any, shape: Any) -> bytes:
    content = msgspec.msgpack.encode({"name": name, "dtype": dtype, "shape": shape})
    return struct.pack("<I", len(content)) + content


def read(content: bytes, most: int = 1 << 20) -> list[tuple[str, np.ndarray[Any, Any]]]:
    reader = ObjectReader(most)
    items = list(reader.feed(content))
    reader.finish()
    return items


@settings(max_examples=50)
@given(named, st.integers(1, 50))
def test_items_come_back_however_the_bytes_are_cut(items: list[tuple[str, np.ndarray[Any, Any]]], step: int) -> None:
    content = b"".join(object_chunks(items))
    reader = ObjectReader(1 << 20)
    found = [item for begin in range(0, len(content), step) for item in reader.feed(content[begin : begin + step])]
    reader.finish()
    assert [name for name, _ in found] == [name for name, _ in items]
    for (_, there), (_, here) in zip(found, items, strict=True):
        assert there.dtype == here.dtype
        assert there.shape == here.shape
        assert there.tobytes() == here.tobytes()


@settings(max_examples=50)
@given(named, st.data())
def test_damaged_stream_is_refused_or_read_without_another_error(
    items: list[tuple[str, np.ndarray[Any, Any]]], data: st.DataObject
) -> None:
    content = bytearray(b"".join(object_chunks(items)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        read(bytes(content))


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_are_a_stream(content: bytes) -> None:
    with contextlib.suppress(FormatError):
        read(content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an object stream was cut short"),
        (b"\0\0\0", "an object stream was cut short"),
        (announced("a", "F32", (2,)) + bytes(7), "an object stream was cut short"),
        (b"\0\0\0\0x", "an object stream goes on after its end"),
        (b"\xff\xff\xff\xff", "an item's announcement of 4294967295 bytes, at most 65536 are allowed"),
        (struct.pack("<I", 3) + b"\xc1\xc1\xc1", "malformed announcement of an item"),
        (announced("a", "F99", (2,)), "item 'a': unknown dtype 'F99'; known are BOOL, U8"),
        (announced("a", "F64", (1 << 17, 2)), "item 'a': 2097152 bytes, at most 1048576 are allowed"),
        (announced("a", "F64", (-1,)), "malformed announcement of an item"),
        (announced("a", "F64", (1 << 48,)), "malformed announcement of an item"),
        (announced("a", "F64", (1 << 47, 1 << 47, 0)), r"item 'a': shape .* is beyond any memory"),
        (announced("a", "U8", (1,) * 17), "malformed announcement of an item"),
        (announced("x" * 1_001, "U8", ()), "malformed announcement of an item"),
        (struct.pack("<I", 60_000) + b"\x81\xa1z" + b"\x91" * 59_997, "malformed announcement of an item"),
    ],
)
def test_malformed_stream_is_refused_with_its_own_text(content: bytes, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        read(content)


def test_declared_size_takes_no_memory_before_its_bytes_come() -> None:
    reader = ObjectReader(1 << 40)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(FormatError, match="at most"):
        list(ObjectReader(1 << 20).feed(announced("a", "F32", (1 << 30,))))
    assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
    tracemalloc.stop()
    assert list(reader.feed(announced("a", "U8", ()))) == []


def test_dtype_that_has_no_code_is_a_mistake_of_the_sender() -> None:
    with pytest.raises(FormatError, match="item 'c' of complex128 cannot be sent; dtypes are BOOL"):
        list(object_chunks([("c", np.zeros(2, complex))]))


def test_chunks_of_large_arrays_are_views_but_for_the_last_which_do_not_keep_the_array() -> None:
    array = np.arange((KEPT_CHUNKS + 3) * CHUNK_BYTES // 4, dtype=np.float32)
    chunks = list(object_chunks([("a", array)]))
    assert max(map(len, chunks)) == CHUNK_BYTES
    views = [np.shares_memory(np.frombuffer(chunk, np.uint8), array) for chunk in chunks[1:-1]]
    assert views == [True] * 3 + [False] * KEPT_CHUNKS


def test_item_is_given_up_before_the_next_one_is_made() -> None:
    made: list[weakref.ref[object]] = []

    def items() -> Iterator[np.ndarray[Any, Any]]:
        for _ in range(3):
            assert not [each for each in made if each() is not None]
            array = np.zeros(2 * KEPT_CHUNKS * CHUNK_BYTES, np.uint8)
            made.append(weakref.ref(array))
            yield array
            del array

    kept: collections.deque[memoryview] = collections.deque(maxlen=KEPT_CHUNKS)
    with ObjectPayload(items()).read() as reader:
        kept.extend(chunk.view for chunk in reader)
    assert len(made) == 3


def test_next_item_is_asked_for_when_the_one_before_has_left() -> None:
    asked: list[int] = []

    def items() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for number in range(3):
            asked.append(number)
            yield str(number), np.zeros(CHUNK_BYTES, np.uint8)

    chunks = object_chunks(items())
    assert (len(next(chunks)) < 100, asked) == (True, [0])
    assert (len(next(chunks)), asked) == (CHUNK_BYTES, [0])
    assert (len(next(chunks)) < 100, asked) == (True, [0, 1])


def test_strided_and_big_endian_arrays_come_back_as_values() -> None:
    strided = np.arange(20, dtype=np.int32).reshape(4, 5)[::2, ::-1]
    big = np.arange(4, dtype=">f8")
    found = dict(read(b"".join(object_chunks([("s", strided), ("b", big)]))))
    np.testing.assert_array_equal(found["s"], strided)
    np.testing.assert_array_equal(found["b"], big)
    assert found["b"].dtype == np.dtype("<f8")
