"""Read a model's layout from a stream, chunk by chunk: the header is checked first, then values come as they arrive."""

from __future__ import annotations

__all__ = ["LayoutReader", "Piece"]

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedbio.errors import FormatError
from fedbio.tensors.layout import DTYPES, PREFIX_BYTES, TensorLimits, header_length, parse_header
from fedbio.tensors.quantize import SCHEMES, SEGMENT_VALUES, decode, encoded_bytes
from fedbio.tensors.quantized import quantized_specs


class Piece(NamedTuple):
    """Some elements of one tensor."""

    name: str
    start: int
    """Where the elements begin in the flattened tensor."""
    values: np.ndarray[Any, Any]
    """One dimension, the tensor's own dtype. Valid until the next `LayoutReader.feed`: it may view the chunk."""


class _Tensor(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    elements: int
    scheme: str | None


class LayoutReader:
    """Read a safetensors layout from a stream, chunk by chunk, from someone who may not mean well.

    Every tensor's name, shape, dtype and place are checked before its first byte. Quantized tensors come out
    dequantized. Memory: the header, and at most one segment of `fedbio.tensors.quantize`.

    Parameters
    ----------
    limits : TensorLimits, optional
        What to accept.
    schemes : collection of str
        The quantization schemes to accept.

    Attributes
    ----------
    specs : mapping of str to (shape, dtype), or None
        What the tensors are, in the order of their data, as `fedbio.tensors.manifest` gives it; None until the header
        has arrived and been checked.

    Examples
    --------
    >>> import numpy as np
    >>> from fedbio.tensors import chunks
    >>> reader = LayoutReader()
    >>> for chunk in chunks({"x": np.arange(4, dtype=np.float32)}, size=72):
    ...     for piece in reader.feed(chunk):
    ...         print(piece.name, piece.start, piece.values)
    x 0 [0. 1.]
    x 2 [2. 3.]
    >>> reader.finish()
    """

    specs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]] | None

    def __init__(self, *, limits: TensorLimits | None = None, schemes: Collection[str] = tuple(SCHEMES)) -> None:
        self.specs = None
        self._limits = limits or TensorLimits()
        self._schemes = schemes
        self._header_bytes = 0
        self._carried = bytearray()  # of the header, an element or a segment that is not whole yet
        self._tensors: Iterator[_Tensor] = iter(())
        self._tensor: _Tensor | None = None
        self._start = 0  # of the next element

    def feed(self, chunk: bytes | bytearray | memoryview) -> Iterator[Piece]:
        """Yield the pieces that are whole with this chunk; take them all before the next chunk is fed.

        Chunks may begin and end anywhere. A tensor's pieces come in order and tile it; an empty tensor has none.

        Raises
        ------
        FormatError
            If the header is malformed, or bytes follow the last tensor. Nothing can be fed after that.
        """
        view = memoryview(chunk).cast("B")
        if self.specs is None:
            view = self._take_header(view)
        while len(view):
            tensor = self._tensor
            if tensor is None:
                raise FormatError(f"{len(view)} bytes after the last tensor belong to none")
            need = self._unit(tensor)
            if self._carried or len(view) < need:
                taken = need - len(self._carried)
                self._carried += view[:taken]
                view = view[taken:]
                if len(self._carried) < need:
                    return
                # a view holds the bytearray, so the next carry is another one
                raw, self._carried = memoryview(self._carried), bytearray()
            else:
                left = tensor.elements - self._start
                whole = need if tensor.scheme else min(len(view) // need, left) * need
                raw, view = view[:whole], view[whole:]
            yield self._take_piece(tensor, raw)

    def finish(self) -> None:
        """Make sure that nothing is missing.

        Raises
        ------
        FormatError
            If the stream ended early.
        """
        if self.specs is None:
            raise FormatError(f"the stream ended within its header, after {len(self._carried)} bytes")
        if self._tensor is not None:
            name, _, count, _ = self._tensor
            raise FormatError(f"tensor {name!r}: ends at element {self._start} of {count}; the data are cut short")

    def _take_header(self, view: memoryview) -> memoryview:
        """Gather the header and check it; return what follows it."""
        if not self._header_bytes:
            view = self._carry(view, PREFIX_BYTES)
            if len(self._carried) < PREFIX_BYTES:
                return view
            self._header_bytes = PREFIX_BYTES + header_length(self._carried, self._limits)
        view = self._carry(view, self._header_bytes)
        if len(self._carried) == self._header_bytes:
            text, self._carried = self._carried[PREFIX_BYTES:], bytearray()
            self._open(text)
        return view

    def _carry(self, view: memoryview, whole: int) -> memoryview:
        taken = whole - len(self._carried)
        self._carried += view[:taken]
        return view[taken:]

    def _open(self, text: bytearray) -> None:
        head = parse_header(text, self._limits)
        quantized = quantized_specs(head, self._limits, self._schemes)
        specs, tensors = {}, []
        for name, stored in head.tensors.items():
            spec = quantized.get(name, stored)
            dtype = DTYPES[spec.dtype]
            specs[name] = (spec.shape, dtype)
            scheme = quantized[name].scheme if name in quantized else None
            tensors.append(_Tensor(name, dtype, math.prod(spec.shape), scheme))
        self.specs = specs
        self._tensors = (tensor for tensor in tensors if tensor.elements)
        self._tensor = next(self._tensors, None)

    def _unit(self, tensor: _Tensor) -> int:
        """Return the fewest bytes that can be read next: an element, or a segment of quantized ones."""
        if tensor.scheme is None:
            return tensor.dtype.itemsize
        return encoded_bytes(tensor.scheme, min(SEGMENT_VALUES, tensor.elements - self._start))

    def _take_piece(self, tensor: _Tensor, raw: memoryview) -> Piece:
        if tensor.scheme is None:
            values = np.frombuffer(raw, tensor.dtype)
            values = values if values.flags.aligned else values.copy()
        else:
            try:
                decoded = decode(tensor.scheme, raw, min(SEGMENT_VALUES, tensor.elements - self._start))
            except FormatError as error:
                raise FormatError(f"tensor {tensor.name!r}: {error}") from None
            values = decoded.astype(tensor.dtype, copy=False)
        piece = Piece(tensor.name, self._start, values)
        self._start += len(values)
        if self._start == tensor.elements:
            self._tensor, self._start = next(self._tensors, None), 0
        return piece
