"""Write named tensors to a safetensors file, whole or not at all, and map one back into memory."""

from __future__ import annotations

__all__ = ["open_file", "write_file"]

import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbio.errors import FormatError
from fedbio.files import whole_file
from fedbio.tensors.layout import TensorLimits, chunks, parse


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path` chunk by chunk; the file appears whole or not at all."""
    with whole_file(path) as beside, open(beside, "wb") as file:
        for chunk in chunks(tensors, metadata=metadata):
            file.write(chunk)


def open_file(path: str | os.PathLike[str], *, limits: TensorLimits | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Return a safetensors file's tensors as read-only arrays over the mapped file.

    Pages are read when they are touched; the map lives as long as one of the arrays does.

    Raises
    ------
    FormatError
        If the file is malformed in any way; the message names file and tensor.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError(f"{os.fspath(path)}: the file is empty, not safetensors; write it again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return parse(memoryview(mapped), limits=limits)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: not a sound safetensors file: {error}; get a fresh copy") from error
