"""Lay named tensors out as safetensors bytes, and read such bytes from someone who may not mean well.

The layout: eight bytes with the header's length (unsigned, little endian); the header, a JSON object that gives each
tensor's ``dtype``, ``shape`` and ``data_offsets`` (begin and end, counted from the end of the header), padded with
spaces to a multiple of eight bytes; then the tensors' bytes in C order and little endian. The offsets tile the data
exactly. Holes could smuggle bytes past a check of the tensors, overlaps could make a small file claim much memory.
"""

from __future__ import annotations

__all__ = ["TensorLimits", "TensorSpec", "chunks", "encoded_size", "header", "parse"]

import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from fedbio.errors import FormatError

CHUNK_BYTES = 1 << 20
"""Size of every chunk but the last."""

DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_LENGTH = struct.Struct("<Q")
PREFIX_BYTES = _LENGTH.size
"""What comes before the JSON header: its length."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorLimits:
    """What a reader accepts."""

    max_header_bytes: int = 16 << 20
    """Bytes of the JSON header."""
    max_tensors: int = 100_000
    """Tensors in one buffer."""
    max_dimensions: int = 16
    """Dimensions of one tensor."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor's entry in the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Header(NamedTuple):
    """What a sound header says."""

    tensors: dict[str, TensorSpec]
    """In the order of their data."""
    metadata: dict[str, str]
    data_bytes: int
    """Bytes that follow the header."""


def header(tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return everything before the data: the length, the JSON header and its padding.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Laid out in the mapping's order.
    metadata : mapping of str to str, optional
        Kept under ``__metadata__``.

    Raises
    ------
    FormatError
        If a tensor's dtype has no code in the format.
    """
    return manifest_header({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, metadata)


def manifest_header(
    manifest: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return what `header` does, for tensors of which only shape and dtype are known."""
    entries = []
    for name, (shape, dtype) in manifest.items():
        code = CODES.get(dtype.newbyteorder("<"))
        if code is None:
            raise FormatError(f"tensor {name!r} of {dtype} cannot be stored; dtypes are {', '.join(DTYPES)}")
        entries.append((name, code, shape, math.prod(shape) * dtype.itemsize))
    return encode_header(entries, metadata)


def encode_header(
    entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header of tensors given by name, dtype's code, shape and number of bytes."""
    encoded: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, code, shape, nbytes in entries:
        if name == "__metadata__":
            raise FormatError("tensor '__metadata__' cannot be stored; the format keeps that name for itself")
        encoded[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, begin + nbytes)}
        begin += nbytes
    text = msgspec.json.encode(encoded)
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def encoded_size(tensors: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """Return how many bytes `chunks` yields in all."""
    return len(header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def chunks(
    tensors: Mapping[str, np.ndarray[Any, Any]], size: int = CHUNK_BYTES, metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """Yield the layout in chunks of exactly `size` bytes (the last may be shorter), without a copy of the whole.

    Large tensors are passed through as views; only the header, small tensors and the ends of large ones are
    gathered. A tensor that is not contiguous or not little endian is copied, one at a time.
    """
    return gather(_pieces(tensors, metadata), size)


def gather(pieces: Iterable[memoryview], size: int) -> Iterator[memoryview]:
    """Yield the bytes of `pieces` in chunks of exactly `size` (the last may be shorter); whole chunks are views."""
    gathered = bytearray()
    for piece in pieces:
        while len(piece):
            if not gathered and len(piece) >= size:
                yield piece[:size]
                piece = piece[size:]
                continue
            taken = min(size - len(gathered), len(piece))
            gathered += piece[:taken]
            piece = piece[taken:]
            if len(gathered) == size:
                yield memoryview(gathered)
                gathered = bytearray()
    if gathered:
        yield memoryview(gathered)


def _pieces(tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None) -> Iterator[memoryview]:
    yield memoryview(header(tensors, metadata))
    for tensor in tensors.values():
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: np.ndarray[Any, Any]) -> memoryview:
    """Return a tensor's bytes in C order and little endian: a view where it is laid out so, else a copy."""
    plain = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def parse(
    buffer: bytes | bytearray | memoryview, *, limits: TensorLimits | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors in a buffer as arrays over it, after checking every bound.

    Parameters
    ----------
    buffer : bytes-like
        The whole layout. The arrays keep it alive and are writable if it is.
    limits : TensorLimits, optional
        What to accept.

    Returns
    -------
    dict of str to ndarray
        In the order of their data. A view wherever the data lie aligned, else a copy of that tensor.

    Raises
    ------
    FormatError
        With one text for each way to be malformed; a tensor at fault is named.
    """
    limits = limits or TensorLimits()
    view = memoryview(buffer).cast("B")
    if len(view) < PREFIX_BYTES:
        raise FormatError(f"{len(view)} bytes are too few for a safetensors header")
    start = PREFIX_BYTES + header_length(view[:PREFIX_BYTES], limits)
    if start > len(view):
        found = len(view) - PREFIX_BYTES
        raise FormatError(f"header of {start - PREFIX_BYTES} bytes is cut short; only {found} bytes follow")
    head, data = parse_header(view[PREFIX_BYTES:start], limits), view[start:]
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, spec in head.tensors.items():
        begin, end = spec.data_offsets
        if end > len(data):
            raise FormatError(f"tensor {name!r}: ends at byte {end} of {len(data)}; the data are cut short")
        array = np.frombuffer(data[begin:end], dtype=DTYPES[spec.dtype]).reshape(spec.shape)
        tensors[name] = array if array.flags.aligned else array.copy()
    if head.data_bytes != len(data):
        raise FormatError(f"{len(data) - head.data_bytes} bytes after the last tensor belong to none")
    return tensors


def header_length(prefix: bytes | bytearray | memoryview, limits: TensorLimits) -> int:
    """Return the bytes of the JSON header, from the `PREFIX_BYTES` before it."""
    (length,) = _LENGTH.unpack(prefix)
    if length > limits.max_header_bytes:
        raise FormatError(f"header of {length} bytes is larger than the {limits.max_header_bytes} allowed")
    return int(length)


def parse_header(text: bytes | bytearray | memoryview, limits: TensorLimits) -> Header:
    """Return what a JSON header says, once every tensor in it is sound and they tile the data.

    Raises
    ------
    FormatError
        With one text for each way to be malformed; a tensor at fault is named.
    """
    try:
        decoded = bytes(text).decode()
    except UnicodeDecodeError as error:
        raise FormatError("header is not UTF-8 text") from error
    raw = read_object(decoded, "header")
    metadata = convert("__metadata__", raw.pop("__metadata__", {}), dict[str, str])
    if len(raw) > limits.max_tensors:
        raise FormatError(f"{len(raw)} tensors are more than the {limits.max_tensors} allowed")
    entries = {name: convert(name, entry, TensorSpec) for name, entry in raw.items()}
    position = 0
    tensors = {}
    for name, spec in sorted(entries.items(), key=_by_offsets):
        dtype = DTYPES.get(spec.dtype)
        if dtype is None:
            raise FormatError(f"tensor {name!r}: unknown dtype {spec.dtype!r}; known are {', '.join(DTYPES)}")
        nbytes = count_elements(name, spec.shape, limits) * dtype.itemsize
        begin, end = spec.data_offsets
        if not 0 <= begin <= end:
            raise FormatError(f"tensor {name!r}: offsets {begin} to {end} are not a range")
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise FormatError(f"tensor {name!r}: offset {begin} {fault}; expected {position}")
        if end - begin != nbytes:
            raise FormatError(
                f"tensor {name!r}: shape {list(spec.shape)} of {spec.dtype} takes {nbytes} bytes, "
                f"its offsets span {end - begin}"
            )
        tensors[name] = spec
        position = end
    return Header(tensors, metadata, position)


def _by_offsets(entry: tuple[str, TensorSpec]) -> tuple[int, int]:
    # empty tensors share their offset with the next one: sort by end too, so that they come first
    return entry[1].data_offsets


def read_object(text: str, what: str) -> dict[str, Any]:
    """Return a JSON object in which no name occurs twice; `what` names it in a refusal."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) < len(pairs):
            seen: set[str] = set()
            twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise FormatError(f"{what} names {twin!r} twice")
        return unique

    try:
        raw = json.loads(text, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{what} is not a JSON object")
    return raw


def convert(name: str, value: Any, wanted: type[T]) -> T:
    """Return a header's value as `wanted`; refuse it in the name of its tensor."""
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise FormatError(f"tensor {name!r}: malformed header entry: {error}") from error


def count_elements(name: str, shape: tuple[int, ...], limits: TensorLimits) -> int:
    """Return the elements of a tensor, once its shape is sound; Python's integers cannot overflow."""
    if len(shape) > limits.max_dimensions:
        raise FormatError(f"tensor {name!r}: {len(shape)} dimensions, at most {limits.max_dimensions} are allowed")
    if min(shape, default=0) < 0:
        raise FormatError(f"tensor {name!r}: negative dimension in shape {list(shape)}")
    count = math.prod(shape)
    if max(shape, default=0) > sys.maxsize or count > sys.maxsize:
        raise FormatError(f"tensor {name!r}: shape {list(shape)} overflows")
    return count
