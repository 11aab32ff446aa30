"""Read an HDF5 file with one dataset per protein, whoever wrote it, and trust nothing that it says."""

from __future__ import annotations

__all__ = ["Entry", "FlatFile", "is_flat"]

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

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


class Entry(NamedTuple):
    """What the file says of one dataset.

    Parameters
    ----------
    id : str
        The attribute ``original_id``, or the key.
    digest : bytes or None
        SHA-256 of the sequence, if it is said.
    length : int
        Residues of the protein; 0 if it is not said.
    place : int
        Where the protein stood in the file that this one was made of; 0 if it is not said.
    """

    id: str
    digest: bytes | None
    length: int
    place: int


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
    entries : dict of str to Entry
        By key, in the file's order.
    width : int
        Of the first dataset; all must have it.

    Raises
    ------
    DataError
        If there is no such file, or no dataset in it.
    FormatError
        If it is not HDF5, an attribute of a dataset is not what it should be, or the first dataset is no embedding.
    """

    def __init__(self, path: _StrPath) -> None:
        self.path = Path(path)
        self._file = _open(path)
        try:
            self.attributes = {name: _plain(value) for name, value in self._file.attrs.items()}
            self.entries: dict[str, Entry] = {}
            self._file.visititems(self._note)
            if not self.entries:
                raise DataError(f"{path}: no embedding in the file; was it written or copied completely?")
            self.width = 0
            first = self._dataset(next(iter(self.entries)))
            self.width = int(first.shape[-1])
        except BaseException:
            self._file.close()
            raise

    def _note(self, key: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            self.entries[key] = self._entry(key, dict(item.attrs.items()) if len(item.attrs) else {})

    def _entry(self, key: str, attributes: dict[str, Any]) -> Entry:
        name = attributes.get("original_id", key)
        digest = None
        if "sha256" in attributes:
            digest = _digest(attributes["sha256"])
            if digest is None:
                found = _plain(attributes["sha256"])
                raise FormatError(
                    f"{self.path}: dataset {key!r}: attribute sha256 is {found!r}, not 64 hexadecimal digits"
                )
        for least, number in ((1, "length"), (0, "place")):
            found = _plain(attributes.get(number, 1))
            if not isinstance(found, int) or found < least:
                raise FormatError(f"{self.path}: dataset {key!r}: attribute {number} is {found!r}, not a whole number")
        return Entry(
            id=name.decode(errors="replace") if isinstance(name, bytes) else str(name),
            digest=digest,
            length=int(attributes.get("length", 0)),
            place=int(attributes.get("place", 0)),
        )

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __enter__(self) -> FlatFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def keys_by_id(self) -> dict[str, str]:
        """The key of each protein by its id.

        Raises
        ------
        FormatError
            If an id stands there twice.
        """
        keys: dict[str, str] = {}
        for key, entry in self.entries.items():
            if keys.setdefault(entry.id, key) != key:
                raise FormatError(
                    f"{self.path}: datasets {keys[entry.id]!r} and {key!r} are both of id {entry.id!r}; "
                    "delete one of them"
                )
        return keys

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
            yield from self._blocks(key, self._dataset(key))

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
        item = self._dataset(key)
        rows = int(item.shape[0]) if item.ndim == 2 else 1
        if rows not in (1, length):
            raise FormatError(
                f"{self.path}: dataset {key!r}: has {rows} rows, but the protein has {length} residues; "
                "is it of another sequence, or cut?"
            )
        if rows == 1:
            whole: NDArray[np.float32] = next(self._blocks(key, item))[0]
            return whole
        total = np.zeros(self.width)
        for block in self._blocks(key, item):
            total += block.sum(axis=0, dtype=np.float64)
        return (total / rows).astype(np.float32)

    def _blocks(self, key: str, item: h5py.Dataset) -> Iterator[NDArray[np.float32]]:
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


def _digest(found: Any) -> bytes | None:
    try:
        digest = bytes.fromhex(found)
    except (TypeError, ValueError):
        return None
    return digest if len(digest) == 32 else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
