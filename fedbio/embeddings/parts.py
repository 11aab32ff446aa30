"""Keep computed rows safe in a folder beside the output while it grows."""

from __future__ import annotations

__all__ = ["Parts"]

import bisect
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import blake3
import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings.form import FORMAT, Floats, check_same_encoder
from fedbio.errors import FormatError
from fedbio.files import read_at, whole_file, write_whole
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"

_VERSION = 2
_READ_BYTES = 2**20
_NAME = re.compile(r"(\d{14})-(\d{14})\.([0-9a-f]{32})\.f32")


class Parts:
    """Finished rows of an embeddings file to be.

    Each shard is a file of raw float32 rows whose name says which rows they are and what their BLAKE3 digest is, so a
    shard that is there under its name is finished, and a damaged one is found. Every shard appears whole. Rows may
    come in any order, and from several processes that each compute others.

    Parameters
    ----------
    output : Path
        The embeddings file to be; the folder is ``OUTPUT.parts``.
    info : EncoderInfo
    work : str
        Names what is computed; parts of other work are thrown away.
    rows : int
        How many rows there will be.
    trusted : bool
        Take the folder as another process has just checked it, and leave its contents alone.

    Attributes
    ----------
    done : int
        How many rows are safe on disk.

    Raises
    ------
    DataError
        If the folder was begun with another encoder.
    """

    SHARD_BYTES = 16 * 2**20
    SHARD_SECONDS = 15.0
    """A shard is written when it holds so much, or when so much work would be lost."""

    def __init__(self, output: Path, *, info: EncoderInfo, work: str, rows: int, trusted: bool = False) -> None:
        self.folder = self.folder_of(output)
        self._width, self._rows = info.width, rows
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._paths: list[Path] = []
        self._pending: list[Floats] = []
        self._pending_start = self._pending_end = 0
        self._pending_since = time.monotonic()
        self.done = 0
        if trusted:
            self._find(trusted=True)
        else:
            self._open({"format": f"{FORMAT}-parts", "version": _VERSION, "work": work, "rows": rows}, info)

    @staticmethod
    def folder_of(output: Path) -> Path:
        """Where the parts of an output are kept."""
        return output.with_name(output.name + ".parts")

    @classmethod
    def begun(cls, output: Path) -> tuple[str, EncoderInfo] | None:
        """Return the name of the work on an output that has finished shards, and its encoder, or None.

        Raises
        ------
        FormatError
            If the manifest is damaged.
        """
        folder = cls.folder_of(output)
        if not (folder / _MANIFEST).is_file() or next(folder.glob("*.f32"), None) is None:
            return None
        found, info = _read_manifest(folder / _MANIFEST)
        return str(found.get("work")), info

    def _open(self, manifest: dict[str, Any], info: EncoderInfo) -> None:
        path = self.folder / _MANIFEST
        if path.is_file():
            found, begun_with = _read_manifest(path)
            if next(self.folder.glob("*.f32"), None) is not None:
                remedy = f"give the settings as before, or delete {self.folder}"
                check_same_encoder(begun_with, info, where=str(path), remedy=remedy)
            if found == manifest and not begun_with.differing(info):
                self._find(trusted=False)
                return
        # shards without their manifest are of unknown work: a deletion was broken off
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_whole(path, json.dumps({**manifest, "encoder": msgspec.to_builtins(info)}, indent=2) + "\n")

    def _find(self, *, trusted: bool) -> None:
        """Collect the shards that are there; unless they are trusted, check them and clear away what is not one."""
        self._starts, self._ends, self._paths, self.done = [], [], [], 0
        for path in sorted(self.folder.glob("*.f32")):
            name = _NAME.fullmatch(path.name)
            start, end = (int(name[1]), int(name[2])) if name else (0, 0)
            if not (self._ends[-1] if self._ends else 0) <= start < end <= self._rows:
                path.unlink()
                continue
            assert name is not None
            if not trusted and not self._is_whole(path, end - start, name[3]):
                log.warning("damaged shard computed again file=%s", path)
                path.unlink()
                continue
            self._add(start, end, path)
        if not trusted:
            for beside in self.folder.glob(".*.part"):
                beside.unlink()

    def _is_whole(self, path: Path, rows: int, checksum: str) -> bool:
        if path.stat().st_size != rows * self._width * 4:
            return False
        digest = blake3.blake3()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest()[:32] == checksum

    def _add(self, start: int, end: int, path: Path) -> None:
        place = bisect.bisect(self._starts, start)
        self._starts.insert(place, start)
        self._ends.insert(place, end)
        self._paths.insert(place, path)
        self.done += end - start

    def refresh(self) -> None:
        """Take up the shards that other processes have written."""
        self._find(trusted=True)

    def holds(self, start: int, end: int) -> bool:
        """Whether all rows from `start` to `end` are safe."""
        while start < end:
            place = bisect.bisect(self._starts, start) - 1
            if place < 0 or self._ends[place] <= start:
                return False
            start = self._ends[place]
        return True

    def held(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of some rows is safe, shape (m,)."""
        if not self._starts:
            return np.zeros(len(rows), dtype=np.bool_)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        safe: NDArray[np.bool_] = (shards >= 0) & (rows < np.array(self._ends)[shards])
        return safe

    def append(self, start: int, vectors: Floats) -> None:
        """Add the rows from number `start`, shape (rows, d); they are safe once a shard is written."""
        if self._pending and self._pending_end != start:
            self.flush()
        if not self._pending:
            self._pending_start = self._pending_end = start
            self._pending_since = time.monotonic()
        if not len(vectors):
            return
        self._pending.append(np.ascontiguousarray(vectors, dtype="<f4"))
        self._pending_end += len(vectors)
        held = (self._pending_end - self._pending_start) * self._width * 4
        if held >= self.SHARD_BYTES or time.monotonic() - self._pending_since >= self.SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard to disk."""
        if not self._pending:
            return
        digest = blake3.blake3()
        for block in self._pending:
            digest.update(block.data.cast("B"))
        start, end = self._pending_start, self._pending_end
        path = self.folder / f"{start:014d}-{end:014d}.{digest.hexdigest()[:32]}.f32"
        with whole_file(path) as beside, open(beside, "wb", buffering=0) as file:
            for block in self._pending:
                _write_all(file.fileno(), block)
        self._pending.clear()
        self._add(start, end, path)

    def take(self, places: NDArray[np.int64]) -> Floats:
        """Return finished rows by their number, shape (len(places), d), float32."""
        return self.runs(places, np.ones(len(places), dtype=np.int64))

    def runs(self, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Floats:
        """Return runs of finished rows, one after the other.

        Parameters
        ----------
        starts, counts : ndarray, shape (runs,), int64
            Each run was added by one call of `append`.

        Returns
        -------
        ndarray, shape (sum of counts, d), float32
        """
        # read, not mapped: what is mapped counts as this process's memory
        vectors = np.empty((int(counts.sum()), self._width), dtype="<f4")
        ends = np.cumsum(counts)
        shards = np.searchsorted(np.array(self._starts, dtype=np.int64), starts, side="right") - 1
        if len(starts) and (shards.min() < 0 or (starts + counts > np.array(self._ends)[shards]).any()):
            raise ValueError(f"{self.done} of {self._rows} rows are there, and not all that are asked for")
        for shard in np.unique(shards).tolist():
            with open(self._paths[shard], "rb", buffering=0) as file:
                first = self._starts[shard]
                for run in np.flatnonzero(shards == shard).tolist():
                    into = vectors[ends[run] - counts[run] : ends[run]]
                    read_at(file.fileno(), into.data, (int(starts[run]) - first) * self._width * 4)
        return vectors


def _read_manifest(path: Path) -> tuple[dict[str, Any], EncoderInfo]:
    try:
        found = json.loads(path.read_bytes())
        return found, msgspec.convert(found.pop("encoder"), EncoderInfo)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{path}: damaged; delete the folder {path.parent.name}") from error


def _write_all(descriptor: int, block: Floats) -> None:
    rest = block.data.cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]
