"""The form of an object stream: named tensors one after the other, each announced just before its bytes.

An item is the length of its announcement (four bytes, unsigned, little endian), the announcement (MessagePack: name,
dtype, shape), and its bytes in C order and little endian. A length of zero ends the stream.
"""

from __future__ import annotations

__all__ = ["CHUNK_BYTES", "Item", "ObjectReader", "object_chunks"]

import math
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from fedbio.errors import FormatError
from fedbio.tensors.layout import DTYPES
from fedbio.transport.sharing import KEPT_CHUNKS

CHUNK_BYTES = 1 << 20
FLUSH_BYTES = 64 << 10
"""An item's last bytes leave with the next item if they are fewer."""
MAX_ANNOUNCEMENT_BYTES = 64 << 10
MAX_EXTENT_BYTES = 1 << 62

_LENGTH = struct.Struct("<I")
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Item = tuple[str, np.ndarray[Any, Any]]


class Announcement(msgspec.Struct, frozen=True):
    """What an item is, before its bytes."""

    name: Annotated[str, Meta(max_length=1_000)]
    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 48)], ...], Meta(max_length=16)]


def object_chunks(items: Iterable[Item]) -> Iterator[memoryview]:
    """Yield the stream in chunks of at most 1 MiB; an item is asked for when the one before has left."""
    gathered = bytearray()
    for name, value in items:
        array = np.asarray(value)
        code = _CODES.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise FormatError(f"item {name!r} of {array.dtype} cannot be sent; dtypes are {', '.join(DTYPES)}")
        announcement = msgspec.msgpack.encode(Announcement(name, code, array.shape))
        gathered += _LENGTH.pack(len(announcement)) + announcement
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        if len(gathered) + len(plain) > FLUSH_BYTES:
            yield memoryview(gathered)
            gathered = bytearray()
            # the last chunks are kept for a while: as copies, so that they do not keep the item
            kept = len(plain) - KEPT_CHUNKS * CHUNK_BYTES
            for begin in range(0, len(plain), CHUNK_BYTES):
                chunk = plain[begin : begin + CHUNK_BYTES]
                yield chunk if begin < kept else memoryview(bytes(chunk))
                del chunk
        else:
            gathered += plain
        del value, array, plain  # before the next one is made
    yield memoryview(gathered + _LENGTH.pack(0))


class ObjectReader:
    """Read an object stream chunk by chunk, from someone who may not mean well.

    Parameters
    ----------
    max_item_bytes : int
        The largest item for which memory is taken.
    """

    def __init__(self, max_item_bytes: int) -> None:
        self._most = max_item_bytes
        self._head = bytearray()
        self._name = ""
        self._array: np.ndarray[Any, Any] | None = None
        self._room = memoryview(b"")
        self._ended = False

    def feed(self, chunk: bytes | memoryview) -> Iterator[Item]:
        """Yield the items that the chunk completes; each is an array of its own.

        Raises
        ------
        FormatError
            If the stream is malformed, or an item is larger than allowed.
        """
        view = memoryview(chunk)
        while len(view):
            if self._ended:
                raise FormatError("an object stream goes on after its end")
            if self._array is None:
                view = self._read_head(view)
                if self._array is None:
                    continue
            taken = min(len(view), len(self._room))
            self._room[:taken] = view[:taken]
            self._room, view = self._room[taken:], view[taken:]
            if not self._room:
                yield self._name, self._array
                self._array = None

    def finish(self) -> None:
        """Raise `FormatError` unless the stream has come to its end."""
        if not self._ended:
            raise FormatError("an object stream was cut short")

    def _read_head(self, view: memoryview) -> memoryview:
        """Read on in the announcement; set the array when it is whole."""
        view = self._fill(view, _LENGTH.size)
        if len(self._head) < _LENGTH.size:
            return view
        (length,) = _LENGTH.unpack_from(self._head)
        if length == 0:
            self._ended = True
            return view
        if length > MAX_ANNOUNCEMENT_BYTES:
            raise FormatError(f"an item's announcement of {length} bytes, at most {MAX_ANNOUNCEMENT_BYTES} are allowed")
        view = self._fill(view, _LENGTH.size + length)
        if len(self._head) == _LENGTH.size + length:
            self._begin(bytes(self._head[_LENGTH.size :]))
            self._head.clear()
        return view

    def _fill(self, view: memoryview, size: int) -> memoryview:
        missing = max(0, size - len(self._head))
        self._head += view[:missing]
        return view[missing:]

    def _begin(self, content: bytes) -> None:
        try:
            item = msgspec.msgpack.decode(content, type=Announcement)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"malformed announcement of an item: {error}") from error
        dtype = DTYPES.get(item.dtype)
        if dtype is None:
            raise FormatError(f"item {item.name!r}: unknown dtype {item.dtype!r}; known are {', '.join(DTYPES)}")
        # an array without elements may still have dimensions beyond any memory
        if math.prod(max(1, length) for length in item.shape) * dtype.itemsize > MAX_EXTENT_BYTES:
            raise FormatError(f"item {item.name!r}: shape {item.shape} is beyond any memory")
        size = math.prod(item.shape) * dtype.itemsize
        if size > self._most:
            raise FormatError(f"item {item.name!r}: {size} bytes, at most {self._most} are allowed")
        self._name = item.name
        self._array = np.empty(item.shape, dtype)
        self._room = self._array.reshape(-1).view(np.uint8).data
