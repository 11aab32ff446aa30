"""Hold what a site sent against what was asked for: in memory, in a file, or while it arrives."""

from __future__ import annotations

__all__ = ["CheckedReader", "Manifest", "check_manifest", "check_matches", "check_values", "is_finite", "manifest"]

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FormatError, ProtocolError
from fedbio.tensors.layout import TensorLimits
from fedbio.tensors.quantize import SCHEMES
from fedbio.tensors.reader import LayoutReader, Piece

Tensors = Mapping[str, np.ndarray[Any, Any]]

Manifest = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape and dtype of each tensor."""


def manifest(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return the shape and dtype of each tensor: what `check_matches` holds an answer against."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def check_manifest(found: Manifest, expected: Manifest, *, source: str = "") -> None:
    """Refuse tensors whose names, shapes or dtypes differ from what is expected.

    Raises
    ------
    ProtocolError
        Naming source and tensor, what was found and what was expected.
    """
    for kind, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            shown = ", ".join(map(repr, sorted(names)[:3]))
            raise ProtocolError(
                f"{_of(source)}{len(names)} tensor(s) {kind}: {shown}; the model differs from the task's"
            )
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            other_shape, other_dtype = found[name]
            raise ProtocolError(
                f"{_of(source)}tensor {name!r}: {other_dtype} {list(other_shape)}, expected {dtype} {list(shape)}"
            )


def check_matches(tensors: Tensors, expected: Tensors | Manifest, *, source: str = "") -> None:
    """Refuse tensors whose names, shapes, dtypes or finiteness differ from what is expected.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        What has arrived.
    expected : mapping
        A model to match, or the `manifest` of one.
    source : str
        Where the tensors came from, for the message.

    Raises
    ------
    ProtocolError
        Naming source and tensor, what was found and what was expected.
    """
    wanted = {
        name: (each.shape, each.dtype) if isinstance(each, np.ndarray) else each for name, each in expected.items()
    }
    check_manifest(manifest(tensors), wanted, source=source)
    for name in wanted:
        tensor = tensors[name]
        if not is_finite(tensor):
            bad = int(tensor.size - np.count_nonzero(np.isfinite(tensor)))
            raise ProtocolError(f"{_of(source)}tensor {name!r}: {bad} of {tensor.size} values are not finite")


def is_finite(values: NDArray[Any]) -> bool:
    """Return whether all values are finite numbers."""
    if values.dtype.kind not in "fc":
        return True
    # one pass without a temporary array decides nearly always: a sum can only hide infinities as NaN, never as a number
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(values, axis=None)
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())


def check_values(name: str, start: int, values: NDArray[Any], *, source: str = "") -> None:
    """Refuse a run of a tensor's values, the first of which has the index `start`, if one is not finite."""
    if not is_finite(values):
        place = start + int(np.argmin(np.isfinite(values)))
        raise ProtocolError(f"{_of(source)}tensor {name!r}: value {place} is not finite")


class CheckedReader:
    """Reads a model from a stream and does what `check_matches` does, piece by piece, with whatever has arrived.

    Parameters
    ----------
    expected : mapping of str to (shape, dtype)
        The names may come in any order.
    source : str
        Where the tensors come from, for the message.
    finite : bool
        Whether to look at the values too; one who looks at what becomes of them need not.
    schemes : collection of str
        The quantization schemes to accept.
    limits : TensorLimits, optional
        What to accept.

    Attributes
    ----------
    specs : mapping of str to (shape, dtype), or None
        What the tensors are, in the order of their data; None until the header has arrived.
    """

    specs: Manifest | None

    def __init__(
        self,
        expected: Manifest,
        *,
        source: str = "",
        finite: bool = True,
        schemes: Collection[str] = tuple(SCHEMES),
        limits: TensorLimits | None = None,
    ) -> None:
        self.specs = None
        self._expected, self._source, self._finite = expected, source, finite
        self._reader = LayoutReader(limits=limits, schemes=schemes)

    def feed(self, chunk: bytes | bytearray | memoryview) -> Iterator[Piece]:
        """Yield the pieces that are whole with this chunk, as `LayoutReader.feed` does.

        Raises
        ------
        ProtocolError
            If the stream is malformed or is not what is expected; names source and tensor.
        """
        try:
            for piece in self._reader.feed(chunk):
                if self.specs is None:
                    self._open()
                if self._finite:
                    check_values(*piece, source=self._source)
                yield piece
        except FormatError as error:
            raise ProtocolError(f"{_of(self._source)}{error}") from error
        if self.specs is None and self._reader.specs is not None:
            self._open()

    def finish(self) -> None:
        """Refuse a stream that ended early."""
        try:
            self._reader.finish()
        except FormatError as error:
            raise ProtocolError(f"{_of(self._source)}{error}") from error

    def _open(self) -> None:
        assert self._reader.specs is not None
        check_manifest(self._reader.specs, self._expected, source=self._source)
        self.specs = self._reader.specs


def _of(source: str) -> str:
    return f"{source}: " if source else ""
