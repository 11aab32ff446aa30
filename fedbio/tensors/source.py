"""Read a safetensors file run by run into memory that the reader brings; nothing of it is mapped."""

from __future__ import annotations

__all__ = ["TensorFile", "check_file"]

import math
import os
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FormatError
from fedbio.files import read_at
from fedbio.tensors.check import Manifest, check_manifest, check_values
from fedbio.tensors.layout import DTYPES, PREFIX_BYTES, TensorLimits, header_length, parse_header

RUN_VALUES = 1 << 18
"""Values read at a time: long enough to make calls cheap, short enough to find them in the cache again."""


class TensorFile:
    """An open safetensors file. Mapped pages would count as this process's memory; reads into a buffer do not.

    Parameters
    ----------
    path : path-like
    limits : TensorLimits, optional
        What to accept.

    Attributes
    ----------
    path : path-like
    manifest : dict of str to (shape, dtype)
        What the tensors are, in the order of their data.
    data_begin, data_bytes : int
        Bytes before the first tensor's, and of all tensors.

    Raises
    ------
    FormatError
        If the file is malformed in any way; the message names file and tensor.
    """

    def __init__(self, path: str | os.PathLike[str], *, limits: TensorLimits | None = None) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            # the kernel reads farther ahead
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._open(limits or TensorLimits())
        except FormatError as error:
            self.close()
            raise FormatError(f"{os.fspath(path)}: not a sound safetensors file: {error}; get a fresh copy") from error
        except BaseException:
            self.close()
            raise

    def _open(self, limits: TensorLimits) -> None:
        text = self._read_header(0, PREFIX_BYTES)
        text = self._read_header(PREFIX_BYTES, header_length(text, limits))
        head = parse_header(text, limits)
        self.data_begin = PREFIX_BYTES + len(text)
        found = os.fstat(self._descriptor).st_size - self.data_begin
        self.data_bytes = head.data_bytes
        if found != head.data_bytes:
            raise FormatError(f"its tensors take {head.data_bytes} bytes, {found} follow the header")
        self.manifest = {name: (spec.shape, DTYPES[spec.dtype]) for name, spec in head.tensors.items()}
        self._begins = {name: self.data_begin + spec.data_offsets[0] for name, spec in head.tensors.items()}

    def _read_header(self, begin: int, size: int) -> bytes:
        text = os.pread(self._descriptor, size, begin)
        if len(text) < size:
            raise FormatError(f"it ends at byte {begin + len(text)}, within its header")
        return text

    def read(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, of one dimension and the tensor's dtype, with the values from index `start` on."""
        shape, dtype = self.manifest[name]
        if out.dtype != dtype or start + len(out) > math.prod(shape):
            raise ValueError(f"tensor {name!r}: values {start} to {start + len(out)} of {dtype} {list(shape)}")
        try:
            read_at(self._descriptor, out.data, self._begins[name] + start * dtype.itemsize)
        except EOFError as error:
            raise FormatError(f"{os.fspath(self.path)}: cut short while it was read; get a fresh copy") from error

    def release(self, name: str, end: int) -> None:
        """Let the kernel drop its copies of what comes before index `end` of a tensor: nobody reads it again."""
        os.posix_fadvise(
            self._descriptor, 0, self._begins[name] + end * self.manifest[name][1].itemsize, os.POSIX_FADV_DONTNEED
        )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_file(
    path: str | os.PathLike[str], expected: Manifest, *, source: str = "", limits: TensorLimits | None = None
) -> None:
    """Do with a file, run by run, what `fedbio.tensors.check_matches` does with a model in memory.

    Raises
    ------
    ProtocolError
        Naming source and tensor, what was found and what was expected.
    FormatError
        If the file is malformed.
    """
    with TensorFile(path, limits=limits) as file:
        check_manifest(file.manifest, expected, source=source)
        buffer = np.empty(RUN_VALUES * 8, np.uint8)
        for name, (shape, dtype) in file.manifest.items():
            if dtype.kind != "f":
                continue
            values, size = buffer.view(dtype)[:RUN_VALUES], math.prod(shape)
            for start in range(0, size, RUN_VALUES):
                run = values[: size - start]
                file.read(name, start, run)
                check_values(name, start, run, source=source)
