"""Lay a model out with quantized tensors: safetensors in which they are bytes, and metadata that say what they were.

A quantized tensor is stored as ``U8`` of one dimension: segments of 262,144 values (the last may be shorter), each the
scales of its blocks and then their codes. ``__metadata__["fedbio.quantized"]`` is a JSON object that gives, by the
tensor's name, its ``scheme``, and the ``dtype`` and ``shape`` to return to. Any safetensors reader can read the layout;
`fedbio.tensors.LayoutReader` returns the values.
"""

from __future__ import annotations

__all__ = [
    "METADATA_KEY",
    "MIN_VALUES",
    "QuantizedSpec",
    "is_quantized",
    "quantized_chunks",
    "quantized_size",
    "quantized_specs",
]

from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FormatError
from fedbio.tensors.layout import (
    CHUNK_BYTES,
    CODES,
    DTYPES,
    Header,
    TensorLimits,
    convert,
    count_elements,
    gather,
    manifest_header,
    read_object,
    tensor_bytes,
)
from fedbio.tensors.quantize import SCHEMES, SEGMENT_VALUES, encode, encoded_bytes

METADATA_KEY = "fedbio.quantized"
"""Under it the metadata name each quantized tensor's scheme, dtype and shape."""

MIN_VALUES = 1024
"""Smaller tensors stay exact: they hold norms and biases, which matter much and weigh little."""

Tensors = Mapping[str, np.ndarray[Any, Any]]


class QuantizedSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a quantized tensor was."""

    scheme: str
    dtype: str
    shape: tuple[int, ...]


def is_quantized(tensor: np.ndarray[Any, Any], scheme: str) -> bool:
    """Return whether `scheme` makes a tensor smaller: one of floats, neither small nor narrow already."""
    is_float = tensor.dtype.kind == "f" and tensor.dtype.newbyteorder("<") in CODES
    return is_float and tensor.size >= MIN_VALUES and encoded_bytes(scheme, tensor.size) < tensor.nbytes


def quantized_size(parameters: Tensors, scheme: str, *, exact: Container[str] = ()) -> int:
    """Return how many bytes `quantized_chunks` yields in all; no value is looked at."""
    stored = (
        encoded_bytes(scheme, tensor.size) if name not in exact and is_quantized(tensor, scheme) else tensor.nbytes
        for name, tensor in parameters.items()
    )
    return len(_header(parameters, scheme, exact)) + sum(stored)


def quantized_chunks(
    parameters: Tensors, scheme: str, size: int = CHUNK_BYTES, *, exact: Container[str] = ()
) -> Iterator[memoryview]:
    """Yield a model's layout, quantized, in chunks of exactly `size` bytes (the last may be shorter).

    Tensors that are not quantized are laid out as `fedbio.tensors.chunks` does. Segments are encoded one at a time
    when their chunk is asked for, so no second model exists. A chunk stays valid as long as it is held: it lies in
    memory of its own, or views a parameter that is not quantized.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        Laid out in the mapping's order.
    scheme : str
        One of `fedbio.tensors.SCHEMES`.
    size : int
        Bytes of each chunk.
    exact : container of str
        Names of further tensors that are not to be quantized.

    Raises
    ------
    FormatError
        Naming a tensor with a value that is not finite or is too large for the scheme, or with a dtype that has no
        code in the format.

    Examples
    --------
    >>> model = {"weight": np.zeros((256, 512), np.float32), "bias": np.zeros(256, np.float32)}
    >>> sum(len(chunk) for chunk in quantized_chunks(model, "nf4")), quantized_size(model, "nf4"), 4 * 256 * 513
    (75008, 75008, 525312)
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known are {', '.join(SCHEMES)}")
    return gather(_pieces(parameters, scheme, exact), size)


def _pieces(parameters: Tensors, scheme: str, exact: Container[str]) -> Iterator[memoryview]:
    yield memoryview(_header(parameters, scheme, exact))
    for name, tensor in parameters.items():
        if name in exact or not is_quantized(tensor, scheme):
            yield tensor_bytes(tensor)
            continue
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, SEGMENT_VALUES):
            try:
                encoded = encode(scheme, flat[start : start + SEGMENT_VALUES])
            except FormatError as error:
                raise FormatError(f"tensor {name!r}: {error}") from None
            yield encoded.data


def _header(parameters: Tensors, scheme: str, exact: Container[str]) -> bytes:
    stored: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    quantized = {}
    for name, tensor in parameters.items():
        if name not in exact and is_quantized(tensor, scheme):
            stored[name] = ((encoded_bytes(scheme, tensor.size),), np.dtype(np.uint8))
            quantized[name] = QuantizedSpec(scheme, CODES[tensor.dtype.newbyteorder("<")], tensor.shape)
        else:
            stored[name] = (tensor.shape, tensor.dtype)
    metadata = {METADATA_KEY: msgspec.json.encode(quantized).decode()} if quantized else None
    return manifest_header(stored, metadata)


def quantized_specs(head: Header, limits: TensorLimits, schemes: Collection[str]) -> dict[str, QuantizedSpec]:
    """Return the quantized tensors of a header, once each is known to hold exactly the bytes its scheme takes.

    Raises
    ------
    FormatError
        Naming the tensor at fault.
    """
    if METADATA_KEY not in head.metadata:
        return {}
    specs = {}
    for name, entry in read_object(head.metadata[METADATA_KEY], f"metadata {METADATA_KEY!r}").items():
        spec = convert(name, entry, QuantizedSpec)
        stored = head.tensors.get(name)
        if stored is None:
            raise FormatError(f"tensor {name!r}: quantized, but not in the header")
        if spec.scheme not in SCHEMES or spec.scheme not in schemes:
            allowed = ", ".join(scheme for scheme in SCHEMES if scheme in schemes) or "none"
            raise FormatError(f"tensor {name!r}: quantized as {spec.scheme!r}; accepted here: {allowed}")
        if spec.dtype not in DTYPES or DTYPES[spec.dtype].kind != "f":
            raise FormatError(f"tensor {name!r}: quantized from {spec.dtype!r}, which is not a float dtype")
        expected = encoded_bytes(spec.scheme, count_elements(name, spec.shape, limits))
        if stored.dtype != "U8" or stored.shape != (expected,):
            raise FormatError(
                f"tensor {name!r}: {spec.scheme} of shape {list(spec.shape)} is stored as U8 [{expected}], "
                f"found {stored.dtype} {list(stored.shape)}"
            )
        specs[name] = spec
    return specs
