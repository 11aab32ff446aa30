"""Read an HDF5 file with one dataset per protein, whoever wrote it, and trust nothing that it says."""

from __future__ import annotations

__all__ = ["FlatFile", "is_flat"]

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import CHUNK_ROWS
from fedbio.errors import DataError, FormatError

_StrPath = str | os.PathLike[str]

MAX_WIDTH = 65_536
"""Beyond it a dataset is no embedding: the widest protein models have 5,120."""
MAX_ROWS = 10_000_000
"""No protein has as many residues."""


def is_flat(path: _StrPath) -> bool:
    """Whether an HDF5 file has one dataset per protein rather than our matrix.

    Raises
    ------
    DataError, FormatError
        If there is no such file, or it is not HDF5.
    """
    with _open(path) as file:
        return "embeddings" not in file or isinstance(file["embeddings"], h5py.Group)


def _open(path: _StrPath) -> h5py.File:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise FormatError(f"{path}: not a readable HDF5 file ({error}); copy it again") from error


class FlatFile:
    """A file with one dataset per protein that is open for reading.

    A key with slashes is a dataset in groups. Links, to other files or within this one, are passed over.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    attributes : dict
        Of the root.
    width : int
        Of the first dataset; all must have it.

    Raises
    ------
    DataError
        If there is no such file, or no dataset in it.
    FormatError
        If it is not HDF5, or the first dataset is no embedding.
    """

    def __init__(self, path: _StrPath) -> None:
        self.path = Path(path)
        self._file = _open(path)
        try:
            self.attributes = {name: _plain(value) for name, value in self._file.attrs.items()}
            self._keys: dict[str, None] = {}
            self._file.visititems(self._note)
            if not self._keys:
                raise DataError(f"{path}: no embedding in the file; was it written or copied completely?")
            self.width = 0
            first = self._dataset(next(iter(self._keys)))
            self.width = int(first.shape[-1])
        except BaseException:
            self._file.close()
            raise

    def _note(self, key: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            self._keys[key] = None

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __enter__(self) -> FlatFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def keys_by_id(self) -> dict[str, str]:
        """The key of each protein: its id is the attribute ``original_id``, or the key itself.

        Raises
        ------
        FormatError
            If an id stands there twice.
        """
        keys: dict[str, str] = {}
        for key in self._keys:
            name = self._file[key].attrs.get("original_id", key)
            name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
            if keys.setdefault(name, key) != key:
                raise FormatError(
                    f"{self.path}: datasets {keys[name]!r} and {key!r} are both of id {name!r}; delete one of them"
                )
        return keys

    def digest_of(self, key: str) -> bytes | None:
        """SHA-256 of the sequence, if the dataset says it."""
        found = _plain(self._file[key].attrs.get("sha256"))
        if found is None:
            return None
        try:
            digest = bytes.fromhex(found)
        except (TypeError, ValueError):
            digest = b""
        if len(digest) != 32:
            raise FormatError(f"{self.path}: dataset {key!r}: attribute sha256 is {found!r}, not 64 hexadecimal digits")
        return digest

    def length_of(self, key: str) -> int:
        """Residues of the protein, as the dataset says."""
        return self._whole_number(key, "length", least=1)

    def place_of(self, key: str) -> int:
        """Where the protein stood in the file that this one was made of; 0 if the dataset does not say it."""
        return self._whole_number(key, "place", least=0) if "place" in self._file[key].attrs else 0

    def _whole_number(self, key: str, name: str, *, least: int) -> int:
        found = _plain(self._file[key].attrs.get(name))
        if not isinstance(found, int) or found < least:
            raise FormatError(f"{self.path}: dataset {key!r}: attribute {name} is {found!r}, not a whole number")
        return found

    def rows_of(self, key: str) -> int:
        """Rows of a dataset that has one per residue."""
        item = self._dataset(key)
        return int(item.shape[0]) if item.ndim == 2 else 1

    def _dataset(self, key: str) -> h5py.Dataset:
        item = self._file[key]
        if item.external or item.is_virtual:
            raise FormatError(f"{self.path}: dataset {key!r}: its values are in another file; copy them into this one")
        width = self.width or (item.shape[-1] if item.shape else 0)
        if (
            item.dtype.kind != "f"
            or item.ndim not in (1, 2)
            or not 1 <= item.shape[-1] <= MAX_WIDTH
            or not 1 <= item.shape[0] <= MAX_ROWS
            or item.shape[-1] != width
        ):
            raise FormatError(
                f"{self.path}: dataset {key!r}: expected a vector of floating-point numbers of width {width or 'D'}, "
                f"or one per residue, found {item.dtype} of shape {item.shape}"
            )
        return item

    def residues(self, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Yield the rows of some datasets, one after another, in blocks."""
        for key in keys:
            yield from self._blocks(key)

    def vectors(self, keys: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield one row for each of some datasets, averaged where there is one per residue, in blocks.

        Raises
        ------
        FormatError
            If a dataset has neither one row nor as many as the protein has residues.
        """
        for first in range(0, len(keys), CHUNK_ROWS):
            here = range(first, min(first + CHUNK_ROWS, len(keys)))
            yield np.stack([self._vector(keys[place], int(lengths[place])) for place in here])

    def _vector(self, key: str, length: int) -> NDArray[np.float32]:
        rows = self.rows_of(key)
        if rows not in (1, length):
            raise FormatError(
                f"{self.path}: dataset {key!r}: has {rows} rows, but the protein has {length} residues; "
                "is it of another sequence, or cut?"
            )
        total = np.zeros(self.width)
        for block in self._blocks(key):
            total += block.sum(axis=0, dtype=np.float64)
        return (total / rows).astype(np.float32)

    def _blocks(self, key: str) -> Iterator[NDArray[np.float32]]:
        item = self._dataset(key)
        for first in range(0, item.shape[0] if item.ndim == 2 else 1, CHUNK_ROWS):
            try:
                block = item[first : first + CHUNK_ROWS] if item.ndim == 2 else item[:][None]
            except OSError as error:
                raise FormatError(
                    f"{self.path}: dataset {key!r}: not readable ({error}); copy the file again"
                ) from error
            with np.errstate(over="ignore"):
                block = block.astype(np.float32)
            if not np.isfinite(block).all():
                raise FormatError(f"{self.path}: dataset {key!r}: holds numbers that are not finite (NaN or infinity)")
            yield block


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
