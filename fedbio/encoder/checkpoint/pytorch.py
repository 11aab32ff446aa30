"""Read a file of ``torch.save`` from someone who may not mean well: nothing in it is run, sizes before memory."""

from __future__ import annotations

__all__ = ["load_pytorch"]

import argparse
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedbio.errors import FormatError


def load_pytorch(path: str | os.PathLike[str], *, where: str) -> Any:
    """Load tensors, numbers, text and containers of these; anything else is refused before it is made.

    Parameters
    ----------
    path : path-like
    where : str
        What messages call the file.

    Returns
    -------
    object
        Tensors may be mapped from the file: copy what is to outlive it.

    Raises
    ------
    FormatError
        If the file is damaged, wants to run code, or claims more numbers than it holds.
    """
    path = Path(path)
    with open(path, "rb") as file:  # a file that cannot be opened is not a damaged one
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            _check_archive(path)
        # fair-esm stores its arguments as a Namespace, which torch refuses by default since 2.6
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a hostile pickle can fail in any way
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{where}: not a checkpoint that can be loaded safely ({why}); get a fresh copy, and only give "
            "checkpoints of encoders: fair-esm .pt, .nemo, or a folder of Hugging Face or fedbio"
        ) from error
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content, depth=3))
    # tied tensors are stored once; a file that shares much more than that is made to fill the memory
    if claimed > 2 * path.stat().st_size:
        raise FormatError(
            f"{where}: its tensors claim {claimed:,} bytes and the file has {path.stat().st_size:,}; not read"
        )
    return content


def _check_archive(path: Path) -> None:
    """Refuse zip archives that torch does not write: compressed parts, or parts that lie over each other."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it has compressed parts, which torch never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its parts are together larger than the file")


def _tensors(content: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict) and depth:
        for value in content.values():
            yield from _tensors(value, depth - 1)
