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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

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
_CODES = {dtype: code for code, dtype in DTYPES.items()}

_LENGTH = struct.Struct("<Q")

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
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        code = _CODES.get(tensor.dtype.newbyteorder("<"))
        if code is None or name == "__metadata__":
            raise FormatError(f"tensor {name!r} of {tensor.dtype} cannot be stored; dtypes are {', '.join(DTYPES)}")
        end = begin + tensor.nbytes
        entries[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    text = msgspec.json.encode(entries)
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
    gathered = bytearray()
    for piece in _pieces(tensors, metadata):
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
        if tensor.size:
            plain = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
            yield plain.reshape(-1).view(np.uint8).data


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
    entries, start = _read_header(view, limits)
    data = view[start:]
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    position = 0
    # empty tensors share their offset with the next one: sort by end too, so that they come first
    for name, spec in sorted(entries.items(), key=lambda entry: entry[1].data_offsets):
        dtype, count = _check_entry(name, spec, limits)
        begin, end = spec.data_offsets
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise FormatError(f"tensor {name!r}: offset {begin} {fault}; expected {position}")
        if end - begin != count * dtype.itemsize:
            raise FormatError(
                f"tensor {name!r}: shape {list(spec.shape)} of {spec.dtype} takes {count * dtype.itemsize} bytes, "
                f"its offsets span {end - begin}"
            )
        if end > len(data):
            raise FormatError(f"tensor {name!r}: ends at byte {end} of {len(data)}; the data are cut short")
        array = np.frombuffer(data[begin:end], dtype=dtype).reshape(spec.shape)
        tensors[name] = array if array.flags.aligned else array.copy()
        position = end
    if position != len(data):
        raise FormatError(f"{len(data) - position} bytes after the last tensor belong to none")
    return tensors


def _read_header(view: memoryview, limits: TensorLimits) -> tuple[dict[str, TensorSpec], int]:
    if len(view) < _LENGTH.size:
        raise FormatError(f"{len(view)} bytes are too few for a safetensors header")
    (length,) = _LENGTH.unpack_from(view)
    if length > limits.max_header_bytes:
        raise FormatError(f"header of {length} bytes is larger than the {limits.max_header_bytes} allowed")
    start = _LENGTH.size + length
    if start > len(view):
        raise FormatError(f"header of {length} bytes is cut short; only {len(view) - _LENGTH.size} bytes follow")
    try:
        raw = json.loads(bytes(view[_LENGTH.size : start]).decode(), object_pairs_hook=_without_twins)
    except UnicodeDecodeError as error:
        raise FormatError("header is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError("header is not a JSON object")
    _convert("__metadata__", raw.pop("__metadata__", {}), dict[str, str])
    if len(raw) > limits.max_tensors:
        raise FormatError(f"{len(raw)} tensors are more than the {limits.max_tensors} allowed")
    return {name: _convert(name, entry, TensorSpec) for name, entry in raw.items()}, start


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise FormatError(f"header names {twin!r} twice")
    return unique


def _convert(name: str, value: Any, wanted: type[T]) -> T:
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise FormatError(f"tensor {name!r}: malformed header entry: {error}") from error


def _check_entry(name: str, spec: TensorSpec, limits: TensorLimits) -> tuple[np.dtype[Any], int]:
    """Return a tensor's dtype and number of elements; Python's integers cannot overflow."""
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise FormatError(f"tensor {name!r}: unknown dtype {spec.dtype!r}; known are {', '.join(DTYPES)}")
    if len(spec.shape) > limits.max_dimensions:
        raise FormatError(f"tensor {name!r}: {len(spec.shape)} dimensions, at most {limits.max_dimensions} are allowed")
    if min(spec.shape, default=0) < 0:
        raise FormatError(f"tensor {name!r}: negative dimension in shape {list(spec.shape)}")
    begin, end = spec.data_offsets
    if not 0 <= begin <= end:
        raise FormatError(f"tensor {name!r}: offsets {begin} to {end} are not a range")
    count = math.prod(spec.shape)
    if max(spec.shape, default=0) > sys.maxsize or count > sys.maxsize:
        raise FormatError(f"tensor {name!r}: shape {list(spec.shape)} overflows")
    return dtype, count
