"""Put the rows of the finished file together: proteins from their pieces, and rows from an earlier file."""

from __future__ import annotations

__all__ = ["Assembly", "KnownRows"]

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import CHUNK_ROWS, RESIDUES, Embeddings, Parts, check_same_encoder
from fedbio.encoder.bins import average_bins
from fedbio.encoder.source import Source
from fedbio.encoder.work import Work, count_residues
from fedbio.proteins.keys import KEY_BYTES, KeyTable
from fedbio.results import EncoderInfo

_BLOCK_BYTES = 8 * 2**20
"""So much is read at once of what becomes a protein's row, or its rows."""


class KnownRows:
    """Which sequences of a source an earlier embeddings file holds; none without a file.

    Parameters
    ----------
    path : Path or None
    info : EncoderInfo
        Of the encoder that must have made it.
    source : Source

    Attributes
    ----------
    places : ndarray, shape (distinct sequences,), int32
        The protein of the file that has the sequence, or -1.
    stored : int
        How many distinct sequences the file holds.

    Raises
    ------
    DataError
        If the file was made with another encoder.
    """

    def __init__(self, path: Path | None, info: EncoderInfo, source: Source) -> None:
        self.places = np.full(len(source.distinct), -1, dtype=np.int32)
        self.stored = 0
        self.file: Embeddings | None = None
        if path is None:
            return
        self.file = Embeddings.open(path)
        remedy = "give the settings that made it, or do without reusing it"
        check_same_encoder(self.file.info, info, where=str(path), remedy=remedy)
        table, firsts, place = KeyTable(), array("q"), 0
        for heads in self.file.heads():
            for digest in heads.digests:
                if table.add(digest[:KEY_BYTES].tobytes()) == len(firsts):
                    firsts.append(place)
                place += 1
        self.stored = len(firsts)
        number = 0
        for digests in source.distinct_digests():
            for digest in digests:
                found = table.find(digest[:KEY_BYTES].tobytes())
                if found >= 0:
                    self.places[number] = firsts[found]
                number += 1

    @property
    def found(self) -> int:
        """How many distinct sequences of the source are in the file."""
        return int((self.places >= 0).sum())

    def __enter__(self) -> KnownRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()


class Assembly:
    """Rows of the finished file in the order of the source.

    Parameters
    ----------
    source : Source
    known : KnownRows
    work : Work
        On the distinct sequences that `known` does not have, in their order.
    parts : Parts
        Holds the rows of `work` in the end.
    """

    def __init__(self, source: Source, known: KnownRows, work: Work, parts: Parts) -> None:
        self._source, self._known, self._work, self._parts = source, known, work, parts
        self._most = max(_BLOCK_BYTES // (4 * work.info.width), 1)  # rows at once
        # number of each distinct sequence in the work; meaningless for those that are known
        self._fresh = np.cumsum(known.places < 0, dtype=np.int32) - 1
        self._firsts = np.concatenate([[0], np.cumsum(work.pieces, dtype=np.int64)])
        # pieces of one protein side by side, in the order of their residues
        self._starts = np.empty(int(self._firsts[-1]), dtype=np.int64)
        self._counts = np.empty(len(self._starts), dtype=np.int32)
        place = 0
        for number, *_ in work.block_rows():
            block = work.block(number)
            order = np.lexsort((block.plan.begin, block.plan.protein))
            here = slice(place, place + len(order))
            self._starts[here] = block.piece_rows[:-1][order]
            self._counts[here] = np.diff(block.piece_rows)[order]
            place += len(order)

    def begun(self) -> int:
        """How many distinct sequences have rows in the parts."""
        if not self._parts.done:
            return 0
        held = self._parts.held(self._starts)
        return int(np.logical_or.reduceat(held, self._firsts[:-1]).sum()) if len(held) else 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows in order, some at a time."""
        if self._work.info.pooling == RESIDUES:
            yield from self._residues()
            return
        for first in range(0, len(self._source), CHUNK_ROWS):
            yield self._pooled(self._source.numbers[first : first + CHUNK_ROWS])

    def _pooled(self, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        places = self._known.places[numbers]
        rows = np.empty((len(numbers), self._work.info.width), dtype=np.float32)
        old, fresh = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
        if len(old):
            assert self._known.file is not None
            rows[old] = self._known.file.take(places[old].astype(np.int64))
        if len(fresh):
            rows[fresh] = self._joined(self._fresh[numbers[fresh]])
        return rows

    def _joined(self, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the rows of sequences of the work, each from the rows of its pieces."""
        # proteins of many windows are joined a few at a time
        ends = np.cumsum(self._firsts[numbers + 1] - self._firsts[numbers])
        groups = np.flatnonzero(np.diff(ends // self._most)) + 1
        if not len(groups):
            return self._joined_at_once(numbers)
        return np.concatenate([self._joined_at_once(some) for some in np.split(numbers, groups)])

    def _joined_at_once(self, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        firsts = self._firsts[numbers]
        counts = self._firsts[numbers + 1] - firsts
        begins = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(begins, counts)
        pieces = self._parts.take(self._starts[np.repeat(firsts, counts) + within])  # (pieces, d)
        pooling = self._work.info.pooling
        how = np.maximum if pooling == "max" else np.add
        rows: NDArray[np.float32] = how.reduceat(pieces, begins, axis=0)  # (proteins, d)
        counted = count_residues(self._work.sequences.lengths[numbers], self._work.info)
        if pooling == "mean":
            rows /= counted.astype(np.float32)[:, None]
        elif pooling == "ends":
            rows = average_bins(rows, counted)
        elif pooling == "start":
            rows /= counts.astype(np.float32)[:, None]
        return rows

    def _residues(self) -> Iterator[NDArray[np.float32]]:
        waiting: list[int] = []  # pieces whose rows are yet to be read, side by side in the file
        rows = 0
        for number in self._source.numbers.tolist():
            place = int(self._known.places[number])
            if place >= 0:
                yield from self._flushed(waiting)
                rows = 0
                yield from self._copied(place)
                continue
            fresh = int(self._fresh[number])
            for piece in range(int(self._firsts[fresh]), int(self._firsts[fresh + 1])):
                waiting.append(piece)
                rows += int(self._counts[piece])
                if rows >= self._most:
                    yield from self._flushed(waiting)
                    rows = 0
        yield from self._flushed(waiting)

    def _flushed(self, waiting: list[int]) -> Iterator[NDArray[np.float32]]:
        if waiting:
            yield self._parts.runs(self._starts[waiting], self._counts[waiting].astype(np.int64))
            waiting.clear()

    def _copied(self, place: int) -> Iterator[NDArray[np.float32]]:
        assert self._known.file is not None
        assert self._known.file.pointers is not None
        first, last = self._known.file.pointers[place : place + 2].tolist()
        for begin in range(first, last, self._most):
            yield self._known.file.span(begin, min(begin + self._most, last))
