"""Hold the tensors of an encoder in one safetensors file: as float32, as float16, or in blocks of int8.

What is written narrower is widened to float32 when it is read, so that all else knows float32 alone. Norms and biases
stay float32 in every form: they weigh little. In ``int8`` the tables of tokens and positions are float16 and only the
matrices of linear maps are bytes, in blocks of 4,096 values with a scale (`fedbio.tensors.quantize`).
"""

from __future__ import annotations

__all__ = ["WEIGHT_FORMS", "WeightForm", "file_weight_form", "read_tensors", "write_tensors"]

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FormatError
from fedbio.tensors.layout import CHUNK_BYTES
from fedbio.tensors.quantized import is_quantized, quantized_chunks
from fedbio.tensors.reader import LayoutReader
from fedbio.tensors.source import TensorFile

WeightForm = Literal["float32", "float16", "int8"]
WEIGHT_FORMS: tuple[WeightForm, ...] = ("float32", "float16", "int8")
"""In which forms a weights file may be written."""

Manifest = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]

_TABLES = ("tokens.weight", "positions.weight")
_FLOAT16_MAX = 65504.0


def write_tensors(path: str | os.PathLike[str], weights: Mapping[str, NDArray[np.float32]], form: WeightForm) -> None:
    """Write `weights` to `path`, which appears as it is written: name a file beside the place where it shall be.

    Raises
    ------
    FormatError
        If a value is not finite, or too large for float16.
    """
    stored: dict[str, NDArray[Any]] = {}
    exact = set()
    for name, tensor in weights.items():
        is_bytes = form == "int8" and tensor.ndim > 1 and name not in _TABLES and is_quantized(tensor, "int8")
        stored[name] = tensor if is_bytes or form == "float32" or tensor.ndim < 2 else _halves(name, tensor)
        if not is_bytes:
            exact.add(name)
    # wide ones first, so that each tensor lies aligned in the file; then by name, as safetensors itself writes them
    names = sorted(stored, key=lambda name: (name not in exact, -stored[name].itemsize, name))
    ordered = {name: stored[name] for name in names}
    with open(path, "wb") as file:
        for chunk in quantized_chunks(ordered, "int8", exact=exact):
            file.write(chunk)


def read_tensors(path: str | os.PathLike[str], check: Callable[[Manifest], None]) -> dict[str, NDArray[np.float32]]:
    """Read a weights file of any form as float32.

    Parameters
    ----------
    path : path-like
    check : callable
        Is given every tensor's shape and dtype before memory is taken for any of them, and raises if they are wrong.

    Returns
    -------
    dict of str to ndarray, float32

    Raises
    ------
    FormatError
        If the file is damaged, or a value is not finite; the message names file and tensor.
    """
    # the header is sound and the file as long as it says: what is allocated below is at most four times the file
    with TensorFile(path) as stored:
        data_begin = stored.data_begin
    reader = LayoutReader(schemes=("int8",))
    weights: dict[str, NDArray[np.float32]] = {}
    with open(path, "rb") as file:
        with _named(path):
            for _ in reader.feed(file.read(data_begin)):
                raise AssertionError("a header holds no values")
        specs = reader.specs
        if specs is None:
            raise FormatError(f"{os.fspath(path)}: changed while it was read; read it again")
        check(specs)
        with _named(path):
            while chunk := file.read(CHUNK_BYTES):
                for piece in reader.feed(chunk):
                    if piece.start == 0:
                        weights[piece.name] = np.empty(specs[piece.name][0], np.float32)
                    if not np.isfinite(piece.values).all():
                        raise FormatError(f"tensor {piece.name!r}: a value is not finite")
                    weights[piece.name].reshape(-1)[piece.start : piece.start + len(piece.values)] = piece.values
            reader.finish()
    return weights


def file_weight_form(path: str | os.PathLike[str]) -> WeightForm:
    """Return in which form a weights file holds its matrices, from its header alone.

    Raises
    ------
    FormatError
        If the file is damaged.
    """
    with TensorFile(path) as stored:
        kinds = {dtype for _, dtype in stored.manifest.values()}
    if np.dtype(np.uint8) in kinds:
        return "int8"
    return "float16" if np.dtype("<f2") in kinds else "float32"


def _halves(name: str, tensor: NDArray[np.float32]) -> NDArray[np.float16]:
    largest = float(np.abs(tensor).max(initial=0))
    if not largest <= _FLOAT16_MAX:
        raise FormatError(f"tensor {name!r}: the value {largest:.6g} is too large for float16; write float32")
    return tensor.astype("<f2")


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name into what is said of its content."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: not a sound safetensors file: {error}; get a fresh copy") from error
