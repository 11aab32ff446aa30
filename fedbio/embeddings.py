"""Keep protein embeddings in one HDF5 file: a matrix, the ids and digests of its rows, and how it was made.

Format ``fedbio-embeddings`` version 1. Datasets: ``/embeddings`` (n, d) float32 or float16 in chunks of 256 rows,
``/ids`` (n,) UTF-8 and unique, ``/lengths`` (n,) int64 in residues, ``/digests`` (n, 32) uint8, SHA-256 of each
sequence. Attributes of the root: ``format``, ``version``, ``fedbio_version`` and the fields of
`fedbio.results.EncoderInfo`. A row was cut or averaged over windows, as ``long`` says, if its length is above
``max_residues``.

While it grows, an embeddings file is a folder of finished shards; the file itself appears whole.
"""

from __future__ import annotations

__all__ = ["CHUNK_ROWS", "Embeddings", "EmbeddingsWriter", "check_same_encoder", "sequence_digest", "write_embeddings"]

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import blake3
import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio import __version__
from fedbio.errors import DataError, FormatError
from fedbio.files import whole_file, write_whole
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)

FORMAT = "fedbio-embeddings"
VERSION = 1
CHUNK_ROWS = 256
"""Rows of a chunk of ``/embeddings``: 768 KiB at width 768."""

Floats = NDArray[np.float32]


def sequence_digest(sequence: str) -> bytes:
    """SHA-256 of a sequence in upper case, 32 bytes."""
    return hashlib.sha256(sequence.encode()).digest()


def check_same_encoder(found: EncoderInfo, wanted: EncoderInfo, *, where: str, remedy: str) -> None:
    """Refuse embeddings of another encoder.

    Raises
    ------
    DataError
        Naming the first attribute that differs, both values, and `remedy`.
    """
    for field in msgspec.structs.fields(EncoderInfo):
        here, there = getattr(found, field.name), getattr(wanted, field.name)
        if here != there:
            raise DataError(f"{where}: made with another encoder: {field.name} is {here!r}, not {there!r}; {remedy}")


class Embeddings:
    """An embeddings file that is open for reading.

    Attributes
    ----------
    ids : list of str
    lengths : ndarray, shape (n,), int64
        Residues of each protein.
    digests : ndarray, shape (n, 32), uint8
        SHA-256 of each sequence.
    info : EncoderInfo

    Examples
    --------
    >>> with Embeddings.open("site-1.h5") as embeddings:  # doctest: +SKIP
    ...     vectors = embeddings.rows(["P12345", "Q67890"])
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self.info = _read_info(path, file)
        missing = {"embeddings", "ids", "lengths", "digests"} - file.keys()
        if missing:
            raise FormatError(f"{path}: dataset /{min(missing)} is missing; embed the proteins again")
        self._matrix: h5py.Dataset = file["embeddings"]
        self.ids: list[str] = file["ids"].asstr()[:].tolist()
        self.lengths: NDArray[np.int64] = file["lengths"][:]
        self.digests: NDArray[np.uint8] = file["digests"][:]
        shapes = (self._matrix.shape, self.lengths.shape, self.digests.shape)
        n = len(self.ids)
        if shapes != ((n, self.info.width), (n,), (n, 32)):
            raise FormatError(f"{path}: {n} ids of width {self.info.width} do not fit the shapes {shapes}")
        self._places = {name: place for place, name in enumerate(self.ids)}
        if len(self._places) != n:
            raise FormatError(f"{path}: some ids stand there twice; embed the proteins again")

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
        return len(self.ids)

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
            If the file lacks some; the message names the first and how many there are.
        """
        missing = [name for name in ids if name not in self._places]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(ids)} proteins have no embedding, first {missing[0]!r}; "
                "embed the file that they come from"
            )
        return self.take(np.array([self._places[name] for name in ids], dtype=np.int64))

    def take(self, places: NDArray[np.int64]) -> Floats:
        """Return rows by their place in the file, shape (len(places), d), float32; each chunk is read once."""
        vectors = np.empty((len(places), self.info.width), dtype=np.float32)
        order = np.argsort(places, kind="stable")
        chunks = places[order] // CHUNK_ROWS
        for chunk in np.unique(chunks).tolist():
            first, last = np.searchsorted(chunks, [chunk, chunk + 1])
            wanted = order[first:last]
            block = self._matrix[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
            vectors[wanted] = block[places[wanted] - chunk * CHUNK_ROWS]
        return vectors

    def blocks(self) -> Iterator[Floats]:
        """Yield all rows in order, `CHUNK_ROWS` at a time."""
        for first in range(0, len(self), CHUNK_ROWS):
            yield self._matrix[first : first + CHUNK_ROWS].astype(np.float32, copy=False)


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


def write_embeddings(
    path: str | os.PathLike[str],
    *,
    info: EncoderInfo,
    ids: Sequence[str],
    lengths: Sequence[int] | NDArray[np.int64],
    digests: Sequence[bytes],
    blocks: Iterable[Floats],
) -> None:
    """Write an embeddings file, whole or not at all; the same content gives the same bytes.

    Parameters
    ----------
    path : path-like
    info : EncoderInfo
    ids, lengths, digests
        One entry per protein.
    blocks : iterable of ndarray, shape (rows, d), float32
        The rows in order, in blocks of any size.

    Raises
    ------
    MachineError
        If the disk is full.
    """
    n, width = len(ids), info.width
    with whole_file(path) as beside:
        # HDF5 notices a full disk late and badly: ask for the room first
        with open(beside, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, n * (width * 4 + 128) + 65_536)
        try:
            with h5py.File(beside, "w") as file:
                file.attrs.update({"format": FORMAT, "version": VERSION, "fedbio_version": __version__})
                file.attrs.update(msgspec.structs.asdict(info))
                options: dict[str, Any] = {"track_times": False}
                chunk = (min(CHUNK_ROWS, n), width) if n else None
                matrix = file.create_dataset("embeddings", (n, width), np.float32, chunks=chunk, **options)
                place = 0
                for block in blocks:
                    matrix[place : place + len(block)] = block[: n - place]
                    place += len(block)
                if place != n:
                    raise ValueError(f"{place} rows for {n} ids")
                file.create_dataset("ids", data=np.array(ids, dtype=object), dtype=h5py.string_dtype(), **options)
                file.create_dataset("lengths", data=np.asarray(lengths, dtype=np.int64), **options)
                table = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(n, 32)
                file.create_dataset("digests", data=table, **options)
        except (OSError, RuntimeError) as error:
            if "No space left" in str(error) or "Disk quota exceeded" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
            raise


class EmbeddingsWriter:
    """Keep computed vectors safe in a folder beside the output while it grows.

    Each shard is a file of raw float32 rows whose name says which rows they are and what their BLAKE3 digest is, so a
    shard that is there under its name is finished, and a damaged one is found. Every shard appears whole.

    Parameters
    ----------
    output : Path
        The embeddings file to be; the folder is ``OUTPUT.parts``.
    info : EncoderInfo
    work : str
        Names what is computed; parts of other work are thrown away.
    rows : int
        How many rows there will be.

    Raises
    ------
    DataError
        If the folder was begun with another encoder.
    """

    SHARD_BYTES = 64 * 2**20
    SHARD_SECONDS = 15.0
    """A shard is written when it holds so much, or when so much work would be lost."""

    def __init__(self, output: Path, *, info: EncoderInfo, work: str, rows: int) -> None:
        self.folder = self.folder_of(output)
        self._width, self._rows = info.width, rows
        self._shards: list[tuple[int, Path]] = []
        self._pending: list[Floats] = []
        self._pending_since = time.monotonic()
        self._maps: list[Floats] = []
        manifest = {"format": f"{FORMAT}-parts", "version": VERSION, "work": work, "rows": rows}
        self.done = 0
        self._open(manifest, info)

    @staticmethod
    def folder_of(output: Path) -> Path:
        """Where the parts of an output are kept."""
        return output.with_name(output.name + ".parts")

    def _open(self, manifest: dict[str, Any], info: EncoderInfo) -> None:
        path = self.folder / "manifest.json"
        if path.is_file():
            try:
                found = json.loads(path.read_bytes())
                begun_with = msgspec.convert(found.pop("encoder"), EncoderInfo)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise FormatError(f"{path}: damaged; delete the folder {self.folder.name}") from error
            remedy = f"give the encoder as before, or delete {self.folder}"
            check_same_encoder(begun_with, info, where=str(path), remedy=remedy)
            if found == manifest:
                self._resume()
                return
            log.warning("unfinished work on other proteins thrown away folder=%s", self.folder)
        # shards without their manifest are of unknown work: a deletion was broken off
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_whole(path, json.dumps({**manifest, "encoder": msgspec.structs.asdict(info)}, indent=2) + "\n")

    def _resume(self) -> None:
        for path in sorted(self.folder.glob("*.f32")):
            name = re.fullmatch(r"(\d{12})-(\d{12})\.([0-9a-f]{32})\.f32", path.name)
            if name is None or int(name[1]) != self.done:
                path.unlink()
                continue
            content = path.read_bytes()
            rows = int(name[2]) - self.done
            if len(content) != rows * self._width * 4 or _checksum(content) != name[3]:
                log.warning("damaged shard computed again file=%s", path)
                path.unlink()
                continue
            self._shards.append((self.done, path))
            self.done += rows
        for beside in self.folder.glob(".*.part"):
            beside.unlink()

    def append(self, vectors: Floats) -> None:
        """Add the next rows, shape (rows, d); they are safe once a shard is written."""
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(vectors)
        held = sum(block.nbytes for block in self._pending)
        if held >= self.SHARD_BYTES or time.monotonic() - self._pending_since >= self.SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard to disk."""
        if not self._pending:
            return
        block = np.concatenate(self._pending).astype("<f4", copy=False)
        end = self.done + len(block)
        path = self.folder / f"{self.done:012d}-{end:012d}.{_checksum(block.data)}.f32"
        with whole_file(path) as beside, open(beside, "wb") as file:
            file.write(block.data)
        self._shards.append((self.done, path))
        self._pending.clear()
        self.done = end

    def take(self, places: NDArray[np.int64]) -> Floats:
        """Return finished rows by their number, shape (len(places), d)."""
        if not self._maps:
            self.flush()
            if self.done != self._rows:
                raise ValueError(f"{self.done} of {self._rows} rows are there")
            self._maps = [np.memmap(path, dtype="<f4", mode="r").reshape(-1, self._width) for _, path in self._shards]
            self._starts = np.array([start for start, _ in self._shards], dtype=np.int64)
        vectors = np.empty((len(places), self._width), dtype=np.float32)
        shard = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(shard).tolist():
            here = shard == number
            vectors[here] = self._maps[number][places[here] - self._starts[number]]
        return vectors

    def remove(self) -> None:
        """Delete the folder, after the output is there."""
        shutil.rmtree(self.folder)


def _checksum(content: bytes | memoryview) -> str:
    return blake3.blake3(memoryview(content).cast("B")).hexdigest()[:32]
