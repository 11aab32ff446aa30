"""Read the proteins of a file once, and keep them on disk: what stays in memory is a few bytes for each."""

from __future__ import annotations

__all__ = ["TEMPORARY_BYTES", "Residues", "Source", "StrPath"]

import contextlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import Embeddings, Heads, sequence_digest
from fedbio.embeddings.form import HEADS
from fedbio.files import full_disk_named
from fedbio.progress import Progress
from fedbio.proteins import Protein, read
from fedbio.proteins.keys import KEY_BYTES, KeyTable

StrPath = str | os.PathLike[str]

DIGEST_BYTES = 32
TEMPORARY_BYTES = 60
"""Of each protein on disk, besides its sequence: digest and id."""


class Residues(Sequence[bytes]):
    """Sequences in a file that is open, each read when it is asked for.

    Parameters
    ----------
    descriptor : int
        Of the file.
    begins : ndarray, shape (n,), int64
        Where in the file each sequence begins.
    lengths : ndarray, shape (n,), int32
        Residues of each, a byte each.
    """

    def __init__(self, descriptor: int, begins: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
        self.descriptor, self.begins, self.lengths = descriptor, begins, lengths

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, number: int) -> bytes: ...
    @overload
    def __getitem__(self, number: slice) -> Residues: ...
    def __getitem__(self, number: int | slice) -> bytes | Residues:
        """Return one sequence, or a view of some."""
        if isinstance(number, slice):
            return Residues(self.descriptor, self.begins[number], self.lengths[number])
        return os.pread(self.descriptor, int(self.lengths[number]), int(self.begins[number]))

    def those(self, wanted: NDArray[np.bool_]) -> Residues:
        """Return a view of the sequences where `wanted`, shape (n,), is true."""
        return self if wanted.all() else Residues(self.descriptor, self.begins[wanted], self.lengths[wanted])


class Source:
    """The proteins of a file as inference wants them, in temporary files that vanish with the process.

    Parameters
    ----------
    path : path-like
        Anything that `fedbio.proteins.read` reads; it is read at once and never again.
    folder : Path
        Where the temporary files are: about a byte per residue and 60 per protein.
    label : str
        What the progress line says.
    labels, classes, skip_invalid
        Passed to `fedbio.proteins.read`.

    Attributes
    ----------
    lengths : ndarray, shape (n,), int32
        Residues of each protein.
    numbers : ndarray, shape (n,), int32
        Which distinct sequence a protein has; they are numbered in the order in which they come first.
    distinct : Residues
        Each distinct sequence once.

    Raises
    ------
    DataError
        If a protein is wrong.
    MachineError
        If the disk is full.
    """

    def __init__(
        self,
        path: StrPath,
        folder: Path,
        *,
        label: str = "reading",
        labels: StrPath | None = None,
        classes: Sequence[str] = COMPARTMENTS,
        skip_invalid: bool = False,
    ) -> None:
        while not folder.is_dir():
            folder = folder.parent
        with contextlib.ExitStack() as stack:
            # without names where the file system can do that: nothing stays behind, whatever ends this process
            files = [
                stack.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".fedbio-", buffering=2**20))
                for _ in range(3)
            ]
            self._residues, self._ids, self._digests = files
            with full_disk_named(folder):
                self._fill(read(path, labels=labels, classes=classes, skip_invalid=skip_invalid), label)
            self._stack = stack.pop_all()

    def _fill(self, proteins: Iterable[Protein], label: str) -> None:
        known = KeyTable()
        lengths, numbers, begins = array("i"), array("i"), array("q", [0])
        with Progress(label, total=None, unit="proteins", passing=True) as progress:
            for protein in proteins:
                digest = sequence_digest(protein.sequence)
                number = known.add(digest[:KEY_BYTES])
                if number == len(begins) - 1:
                    self._residues.write(protein.sequence.encode())
                    begins.append(begins[-1] + len(protein.sequence))
                # an id is printable, so a line's end never is part of it
                self._ids.write(protein.id.encode() + b"\n")
                self._digests.write(digest)
                lengths.append(len(protein.sequence))
                numbers.append(number)
                progress.advance(1)
        for file in (self._residues, self._ids, self._digests):
            file.flush()
        self.lengths: NDArray[np.int32] = np.frombuffer(lengths, dtype=np.int32)
        self.numbers: NDArray[np.int32] = np.frombuffer(numbers, dtype=np.int32)
        ends: NDArray[np.int64] = np.frombuffer(begins, dtype=np.int64)
        self.distinct = Residues(self._residues.fileno(), ends[:-1], np.diff(ends).astype(np.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def residues(self) -> int:
        """Residues of all proteins."""
        return int(self.lengths.sum(dtype=np.int64))

    def heads(self) -> Iterator[Heads]:
        """Yield ids, lengths and digests in the order of the file, `HEADS` proteins at a time."""
        self._ids.seek(0)
        for first in range(0, len(self), HEADS):
            lengths = self.lengths[first : first + HEADS].astype(np.int64)
            ids = [self._ids.readline()[:-1].decode() for _ in range(len(lengths))]
            digests = os.pread(self._digests.fileno(), len(ids) * DIGEST_BYTES, first * DIGEST_BYTES)
            yield Heads(ids, lengths, np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES))

    def distinct_digests(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the SHA-256 of the distinct sequences in order, some at a time, each of shape (m, 32)."""
        first = counted = 0
        for heads in self.heads():
            numbers = self.numbers[first : first + len(heads.ids)]
            first += len(heads.ids)
            highest = np.maximum.accumulate(np.concatenate([[counted - 1], numbers]))
            fresh = numbers > highest[:-1]
            counted = int(highest[-1]) + 1
            yield heads.digests[fresh]

    def is_in(self, embeddings: Embeddings) -> bool:
        """Whether a file holds exactly these proteins in this order."""
        return len(self) == len(embeddings) and all(
            ours.ids == theirs.ids and np.array_equal(ours.digests, theirs.digests)
            for ours, theirs in zip(self.heads(), embeddings.heads(), strict=True)
        )

    def longer_than(self, residues: int) -> int:
        """How many proteins are longer than so many residues."""
        return int((self.lengths > residues).sum())
