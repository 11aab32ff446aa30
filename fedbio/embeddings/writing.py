"""Write an embeddings file, whole or not at all, from rows and heads that come as they are made."""

from __future__ import annotations

__all__ = ["write_embeddings", "write_stream"]

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio import __version__
from fedbio.embeddings.form import CHUNK_ROWS, FORMAT, HEADS, RESIDUES, VERSION, Floats, Heads
from fedbio.files import whole_file
from fedbio.results import EncoderInfo

_HEAD_BYTES = 160
"""Room for the head of a protein: an id of some length, 32 bytes of digest, length, pointer."""


def write_embeddings(
    path: str | os.PathLike[str],
    *,
    info: EncoderInfo,
    ids: Sequence[str],
    lengths: Sequence[int] | NDArray[np.int64],
    digests: Sequence[bytes],
    blocks: Iterable[Floats],
    pointers: NDArray[np.int64] | None = None,
) -> None:
    """Write an embeddings file of proteins whose heads are in memory; the same content gives the same bytes.

    Parameters
    ----------
    path : path-like
    info : EncoderInfo
    ids, lengths, digests
        One entry per protein.
    blocks : iterable of ndarray, shape (rows, d), float32
        The rows in order, in blocks of any size.
    pointers : ndarray, shape (n + 1,), int64, optional
        Where the rows of each protein begin, if `info` has a row per residue.

    Raises
    ------
    MachineError
        If the disk is full.
    """

    def heads() -> Iterator[Heads]:
        table = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), 32)
        for first in range(0, len(ids), HEADS):
            last = first + HEADS
            yield Heads(list(ids[first:last]), np.asarray(lengths[first:last], dtype=np.int64), table[first:last])

    write_stream(path, info=info, proteins=len(ids), heads=heads(), blocks=blocks, pointers=pointers)


def write_stream(
    path: str | os.PathLike[str],
    *,
    info: EncoderInfo,
    proteins: int,
    heads: Iterable[Heads],
    blocks: Iterable[Floats],
    pointers: NDArray[np.int64] | None = None,
) -> None:
    """Write an embeddings file piece by piece; memory does not grow with it.

    Parameters
    ----------
    path : path-like
    info : EncoderInfo
    proteins : int
        How many there will be.
    heads : iterable of Heads
        In order, `HEADS` proteins at a time if the same content shall give the same bytes.
    blocks : iterable of ndarray, shape (rows, d), float32
        The rows in order, in blocks of any size.
    pointers : ndarray, shape (proteins + 1,), int64, optional
        Where the rows of each protein begin, if `info` has a row per residue.

    Raises
    ------
    MachineError
        If the disk is full.
    """
    if (pointers is not None) != (info.pooling == RESIDUES):
        raise ValueError(f"pooling {info.pooling!r} with pointers {pointers is not None}")
    rows = proteins if pointers is None else int(pointers[-1])
    with whole_file(path) as beside:
        # HDF5 notices a full disk late and badly: ask for the room first
        with open(beside, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, rows * info.width * 4 + proteins * _HEAD_BYTES + 65_536)
        try:
            with h5py.File(beside, "w") as file:
                file.attrs.update({"format": FORMAT, "version": VERSION, "fedbio_version": __version__})
                file.attrs.update(msgspec.to_builtins(info))
                _write_rows(file, rows, info.width, blocks)
                if pointers is not None:
                    file.create_dataset("pointers", data=pointers.astype(np.int64, copy=False), track_times=False)
                _write_heads(file, proteins, heads)
        except (OSError, RuntimeError) as error:
            for number, words in _FULL.items():
                if words in str(error):
                    raise OSError(number, words, str(path)) from error
            raise


_FULL = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
}


def _write_rows(file: h5py.File, rows: int, width: int, blocks: Iterable[Floats]) -> None:
    chunk = (min(CHUNK_ROWS, rows), width) if rows else None
    matrix = file.create_dataset("embeddings", (rows, width), np.float32, chunks=chunk, track_times=False)
    place = 0
    for block in blocks:
        if place + len(block) <= rows:
            matrix[place : place + len(block)] = block
        place += len(block)
    if place != rows:
        raise ValueError(f"{place} rows for {rows} ids")


def _write_heads(file: h5py.File, proteins: int, heads: Iterable[Heads]) -> None:
    options: dict[str, Any] = {"track_times": False}
    names = file.create_dataset("ids", (proteins,), h5py.string_dtype(), **options)
    lengths = file.create_dataset("lengths", (proteins,), np.int64, **options)
    digests = file.create_dataset("digests", (proteins, 32), np.uint8, **options)
    place = 0
    for some in heads:
        here = slice(place, place + len(some.ids))
        names[here] = np.array(some.ids, dtype=object)
        lengths[here], digests[here] = some.lengths, some.digests
        place += len(some.ids)
    if place != proteins:
        raise ValueError(f"{place} heads for {proteins} proteins")
