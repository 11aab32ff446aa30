"""See several embeddings files of one encoder as one, with few of them open and little of them in memory."""

from __future__ import annotations

__all__ = ["JoinedFiles", "regrouped"]

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import Embeddings, Heads, check_same_encoder
from fedbio.embeddings.form import HEADS
from fedbio.results import EncoderInfo

OPEN_FILES = 64
"""Files that are open at the same time; thousands of shards would exceed what a process may open."""
BLOCK_ROWS = 2048
"""Rows that are read at a time: 6 MiB at width 768."""


class JoinedFiles:
    """Files that are seen as one: protein after protein, file after file.

    Parameters
    ----------
    paths : sequence of path-like
        At least one.

    Attributes
    ----------
    info : EncoderInfo
    starts : ndarray, shape (files + 1,), int64
        The place of each file's first protein among all.

    Raises
    ------
    DataError
        If the encoders differ, or a file is missing.
    FormatError
        If one is damaged.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = [Path(path) for path in paths]
        self._open: OrderedDict[int, Embeddings] = OrderedDict()
        try:
            self.info: EncoderInfo = self[0].info
            counts = []
            for number, path in enumerate(self.paths):
                remedy = "merge files of one encoder only"
                check_same_encoder(self[number].info, self.info, where=str(path), remedy=remedy)
                counts.append(len(self[number]))
            self.starts = np.cumsum([0, *counts])
        except BaseException:
            self.close()
            raise

    def __getitem__(self, number: int) -> Embeddings:
        if number not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[number] = Embeddings.open(self.paths[number])
        self._open.move_to_end(number)
        return self._open[number]

    def __enter__(self) -> JoinedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.popitem()[1].close()

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Turn places in all files into numbers of files and places in these, each shape (len(places),)."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        return numbers, places - self.starts[numbers]

    def runs(self, places: NDArray[np.int64]) -> Iterator[tuple[Embeddings, int, int]]:
        """Yield a file and a range of its proteins for each run of neighbours."""
        numbers, rows = self.locate(places)
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(numbers) != 0)) + 1
        for run in np.split(np.arange(len(places)), breaks):
            if len(run):
                yield self[int(numbers[run[0]])], int(rows[run[0]]), int(rows[run[-1]]) + 1

    def heads(self, places: NDArray[np.int64]) -> Iterator[Heads]:
        """Yield the heads of proteins in ascending order."""
        chosen = np.zeros(self.starts[-1], dtype=bool)
        chosen[places] = True
        return regrouped(_only(head, chosen[start : start + len(head.ids)]) for start, head in self.numbered_heads())

    def numbered_heads(self) -> Iterator[tuple[int, Heads]]:
        """Yield all heads, each group with the place of its first protein."""
        place = 0
        for number in range(len(self.paths)):
            for head in self[number].heads():
                yield place, head
                place += len(head.ids)

    def blocks(self, places: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the rows of proteins in any order, at most `BLOCK_ROWS` at a time."""
        if self[0].pointers is not None:
            for file, first, last in self.runs(places):
                assert file.pointers is not None
                begin, end = int(file.pointers[first]), int(file.pointers[last])
                for row in range(begin, end, BLOCK_ROWS):
                    yield file.span(row, min(row + BLOCK_ROWS, end))
            return
        for first in range(0, len(places), BLOCK_ROWS):
            numbers, rows = self.locate(places[first : first + BLOCK_ROWS])
            block = np.empty((len(rows), self.info.width), dtype=np.float32)
            for number in np.unique(numbers).tolist():
                here = numbers == number
                block[here] = self[number].take(rows[here])
            yield block

    def pointers(self, places: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Where the rows of each protein begin in the result, shape (len(places) + 1,), if there is one per residue."""
        if self[0].pointers is None:
            return None
        counts = [np.zeros(1, dtype=np.int64)]
        for file, first, last in self.runs(places):
            assert file.pointers is not None
            counts.append(np.diff(file.pointers[first : last + 1]))
        return np.cumsum(np.concatenate(counts))

    def name(self, place: int) -> tuple[str, Path, bytes]:
        """Id, file and the sequence's digest of one protein."""
        numbers, rows = self.locate(np.array([place]))
        number, row = int(numbers[0]), int(rows[0])
        for head in self[number].heads():
            if row < len(head.ids):
                return head.ids[row], self.paths[number], head.digests[row].tobytes()
            row -= len(head.ids)
        raise IndexError(place)


def _only(head: Heads, chosen: NDArray[np.bool_]) -> Heads:
    ids = [name for name, here in zip(head.ids, chosen.tolist(), strict=True) if here]
    return Heads(ids, head.lengths[chosen], head.digests[chosen])


def regrouped(heads: Iterable[Heads]) -> Iterator[Heads]:
    """Yield the same heads, `HEADS` proteins at a time: the bytes of the file depend on it."""
    ids: list[str] = []
    lengths: list[NDArray[np.int64]] = []
    digests: list[NDArray[np.uint8]] = []
    for head in heads:
        ids += head.ids
        lengths.append(head.lengths)
        digests.append(head.digests)
        while len(ids) >= HEADS:
            length, digest = np.concatenate(lengths), np.concatenate(digests)
            yield Heads(ids[:HEADS], length[:HEADS], digest[:HEADS])
            ids, lengths, digests = ids[HEADS:], [length[HEADS:]], [digest[HEADS:]]
    if ids:
        yield Heads(ids, np.concatenate(lengths), np.concatenate(digests))
