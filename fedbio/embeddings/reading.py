"""Read an embeddings file: proteins by id, rows by place, or everything block by block."""

from __future__ import annotations

__all__ = ["Embeddings"]

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings.form import CHUNK_ROWS, FORMAT, HEADS, RESIDUES, VERSION, Floats, Heads
from fedbio.errors import DataError, FormatError
from fedbio.results import EncoderInfo

_KINDS = {"embeddings": "f", "ids": "O", "lengths": "iu", "digests": "u", "pointers": "iu"}
"""What each dataset holds, by NumPy's letters."""
_MOST_COMPRESSED = 1_100
"""What a byte can hold of a dataset that someone has compressed: deflate comes to 1,032."""


class Embeddings:
    """An embeddings file that is open for reading; what is not asked for is not read.

    Attributes
    ----------
    info : EncoderInfo
    ids : list of str
    lengths : ndarray, shape (n,), int64
        Residues of each protein.
    digests : ndarray, shape (n, 32), uint8
        SHA-256 of each sequence.
    pointers : ndarray, shape (n + 1,), int64, or None
        Where the rows of each protein begin, if there is one per residue.

    Examples
    --------
    >>> with Embeddings.open("site-1.h5") as embeddings:  # doctest: +SKIP
    ...     vectors = embeddings.rows(["P12345", "Q67890"])
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self.info = _read_info(path, file)
        per_residue = self.info.pooling == RESIDUES
        self._sets = {name: _dataset(path, file, name) for name in _KINDS if name != "pointers" or per_residue}
        self._matrix = self._sets["embeddings"]
        self._n = int(self._sets["ids"].shape[0])
        self.pointers: NDArray[np.int64] | None = self._sets["pointers"][:] if per_residue else None
        rows = self._n
        if self.pointers is not None:
            rows = int(self.pointers[-1]) if self.pointers.shape == (self._n + 1,) else -1
            if rows < 0 or self.pointers[0] != 0 or (np.diff(self.pointers) < 0).any():
                raise FormatError(f"{path}: dataset /pointers does not fit {self._n} ids; embed the proteins again")
        shapes = (self._matrix.shape, self._sets["lengths"].shape, self._sets["digests"].shape)
        if shapes != ((rows, self.info.width), (self._n,), (self._n, 32)):
            raise FormatError(f"{path}: {self._n} ids of width {self.info.width} do not fit the shapes {shapes}")

    @cached_property
    def ids(self) -> list[str]:
        """Ids in order."""
        ids: list[str] = self._sets["ids"].asstr()[:].tolist()
        if len(set(ids)) != len(ids):
            raise FormatError(f"{self.path}: some ids stand there twice; embed the proteins again")
        return ids

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each protein, shape (n,)."""
        lengths: NDArray[np.int64] = self._sets["lengths"][:]
        return lengths

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """SHA-256 of each sequence, shape (n, 32)."""
        digests: NDArray[np.uint8] = self._sets["digests"][:]
        return digests

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.ids)}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Embeddings:
        """Open a file; use it as a context manager, or call `close`.

        Raises
        ------
        DataError
            If there is no such file.
        FormatError
            If it is damaged, not an embeddings file, or of a version that this release cannot read.
        """
        where = Path(path)
        if not where.is_file():
            raise DataError(f"{where}: no such embeddings file; make it with `fedbio embed`")
        try:
            file = h5py.File(where, "r")
        except OSError as error:
            raise FormatError(f"{where}: not a readable HDF5 file ({error}); embed the proteins again") from error
        try:
            return cls(where, file)
        except BaseException:
            file.close()
            raise

    def __len__(self) -> int:
        return self._n

    def __enter__(self) -> Embeddings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, ids: Sequence[str]) -> Floats:
        """Return the embeddings of some proteins.

        Parameters
        ----------
        ids : sequence of str
            In any order, also several times.

        Returns
        -------
        ndarray, shape (len(ids), d), float32

        Raises
        ------
        DataError
            If the file lacks some; the message names the first and how many there are. Also if it has a row per
            residue.
        """
        return self.take(self._find(ids))

    def residues(self, id: str) -> Floats:
        """Return the embeddings of a protein's residues.

        Returns
        -------
        ndarray, shape (residues, d), float32
            In order; a protein that was cut has as many as the encoder takes.

        Raises
        ------
        DataError
            If the protein is not in the file, or that has one row per protein.
        """
        first, last = self.spans([id])[0].tolist()
        return self.span(first, last)

    def spans(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the first row of each protein and the one after its last, shape (len(ids), 2); see `span`.

        Raises
        ------
        DataError
            As `residues`.
        """
        if self.pointers is None:
            raise DataError(
                f"{self.path}: has one row per protein, by pooling {self.info.pooling!r}; "
                "embed with `--pooling residues` for one per residue"
            )
        places = self._find(ids)
        return np.stack([self.pointers[places], self.pointers[places + 1]], axis=1)

    def _find(self, ids: Sequence[str]) -> NDArray[np.int64]:
        missing = [name for name in ids if name not in self._places]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(ids)} proteins have no embedding, first {missing[0]!r}; "
                "embed the file that they come from"
            )
        return np.array([self._places[name] for name in ids], dtype=np.int64)

    def take(self, places: NDArray[np.int64]) -> Floats:
        """Return rows of proteins by their place in the file, shape (len(places), d), float32.

        Each chunk is read once.

        Raises
        ------
        DataError
            If the file has a row per residue.
        """
        if self.pointers is not None:
            raise DataError(
                f"{self.path}: has one row per residue, and one per protein is needed; "
                "embed again, for example with `--pooling mean`"
            )
        vectors = np.empty((len(places), self.info.width), dtype=np.float32)
        order = np.argsort(places, kind="stable")
        chunks = places[order] // CHUNK_ROWS
        for chunk in np.unique(chunks).tolist():
            first, last = np.searchsorted(chunks, [chunk, chunk + 1])
            wanted = order[first:last]
            block = self._matrix[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
            vectors[wanted] = block[places[wanted] - chunk * CHUNK_ROWS]
        return vectors

    def span(self, first: int, last: int) -> Floats:
        """Return the rows from `first` to `last` as they stand in the file, shape (last - first, d), float32."""
        rows: Floats = self._matrix[first:last].astype(np.float32, copy=False)
        return rows

    def blocks(self) -> Iterator[Floats]:
        """Yield all rows in order, `CHUNK_ROWS` at a time."""
        for first in range(0, self._matrix.shape[0], CHUNK_ROWS):
            yield self.span(first, first + CHUNK_ROWS)

    def heads(self) -> Iterator[Heads]:
        """Yield ids, lengths and digests in order, `HEADS` proteins at a time; ids are not checked to be unique."""
        names = self._sets["ids"].asstr()
        for first in range(0, self._n, HEADS):
            here = slice(first, first + HEADS)
            yield Heads(names[here].tolist(), self._sets["lengths"][here], self._sets["digests"][here])


def _read_info(path: Path, file: h5py.File) -> EncoderInfo:
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()}
    if found.get("format") != FORMAT:
        raise FormatError(
            f"{path}: an HDF5 file, but not of format {FORMAT}; `fedbio embeddings convert` reads those with "
            "one dataset per protein"
        )
    if found.get("version") != VERSION:
        raise FormatError(
            f"{path}: {FORMAT} version {found.get('version')}; this release reads version {VERSION}, update fedbio"
        )
    fields = [field.name for field in msgspec.structs.fields(EncoderInfo)]
    try:
        return msgspec.convert({name: found[name] for name in fields if name in found}, EncoderInfo)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path}: attributes of the root: {error}; embed the proteins again") from error


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that lies in this file with all that it says to hold: reading it takes no more memory."""
    if name not in file:
        raise FormatError(f"{path}: dataset /{name} is missing; embed the proteins again")
    item = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if (
        not isinstance(item, h5py.Dataset)
        or not item.ndim
        or item.dtype.kind not in _KINDS[name]
        or item.is_virtual
        or item.external
    ):
        raise FormatError(f"{path}: /{name} is not a dataset as fedbio writes it; embed the proteins again")
    most = item.id.get_storage_size() * (_MOST_COMPRESSED if item.compression else 1)
    if item.size * item.dtype.itemsize > most:
        raise FormatError(f"{path}: dataset /{name} holds less than it says; embed the proteins again")
    return item
