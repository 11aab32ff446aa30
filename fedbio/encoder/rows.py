"""Put the rows of the finished file together: proteins from their pieces, and rows from an earlier file."""

from __future__ import annotations

__all__ = ["Assembly", "KnownRows"]

import bisect
import contextlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import CHUNK_ROWS, RESIDUES, Embeddings, Parts, check_same_encoder
from fedbio.encoder.bins import average_bins
from fedbio.encoder.work import Work, count_residues
from fedbio.proteins.keys import KEY_BYTES, KeyTable
from fedbio.results import EncoderInfo

_BLOCK_BYTES = 8 * 2**20
"""So much is read at once of what becomes a protein's row, or its rows."""


class KnownRows:
    """Which of some sequences earlier embeddings files hold.

    Parameters
    ----------
    paths : sequence of Path
        The files; of a sequence that several hold, the row of the first is taken.
    info : EncoderInfo
        Of the encoder that must have made them.
    sequences : int
        How many there are to be looked for.
    digests : iterable of ndarray, shape (m, 32), uint8
        Their SHA-256 in order, in any division.

    Attributes
    ----------
    places : ndarray, shape (sequences,), int32
        The protein that has the sequence, counted through all files, or -1.
    stored : int
        How many distinct sequences the first file holds.

    Raises
    ------
    DataError
        If a file was made with another encoder.
    """

    def __init__(
        self, paths: Sequence[Path], info: EncoderInfo, *, sequences: int, digests: Iterable[NDArray[np.uint8]]
    ) -> None:
        self.places = np.full(sequences, -1, dtype=np.int32)
        self.stored = 0
        self._begins = [0]
        self._files: list[Embeddings] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self._look_up(paths, info, digests)
            stack.pop_all()

    def _look_up(self, paths: Sequence[Path], info: EncoderInfo, digests: Iterable[NDArray[np.uint8]]) -> None:
        table, firsts, place = KeyTable(), array("q"), 0
        for path in paths:
            file = Embeddings.open(path)
            self._files.append(file)
            remedy = "give the settings that made it, or do without reusing it"
            check_same_encoder(file.info, info, where=str(path), remedy=remedy)
            for heads in file.heads():
                for digest in heads.digests:
                    if table.add(digest[:KEY_BYTES].tobytes()) == len(firsts):
                        firsts.append(place)
                    place += 1
            self.stored = self.stored or len(firsts)
            self._begins.append(place)
        if not place:
            return
        number = 0
        for some in digests:
            for digest in some:
                found = table.find(digest[:KEY_BYTES].tobytes())
                if found >= 0:
                    self.places[number] = firsts[found]
                number += 1

    @property
    def found(self) -> int:
        """How many of the sequences are in the first file."""
        return int(((self.places >= 0) & (self.places < self._begins[1])).sum())

    def take(self, places: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the rows of proteins of files with one row each, shape (len(places), d)."""
        rows: NDArray[np.float32] | None = None
        for file, begin, end in zip(self._files, self._begins, self._begins[1:], strict=False):
            here = np.flatnonzero((places >= begin) & (places < end))
            found = file.take(places[here].astype(np.int64) - begin)
            if len(here) == len(places):
                return found
            rows = np.empty((len(places), found.shape[1]), dtype=np.float32) if rows is None else rows
            rows[here] = found
        assert rows is not None
        return rows

    def residues(self, place: int, most: int) -> Iterator[NDArray[np.float32]]:
        """Yield the rows of one protein of a file with one for each residue, `most` at a time."""
        which = bisect.bisect(self._begins, place) - 1
        file = self._files[which]
        assert file.pointers is not None
        first, last = file.pointers[place - self._begins[which] :][:2].tolist()
        for begin in range(first, last, most):
            yield file.span(begin, min(begin + most, last))

    def __enter__(self) -> KnownRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()


class Assembly:
    """Rows of the finished file in the order of its proteins.

    Parameters
    ----------
    numbers : ndarray, shape (n,), int32
        Which distinct sequence each protein has.
    known : KnownRows
    work : Work
        On the distinct sequences that `known` does not have, in their order.
    parts : Parts
        Holds the rows of `work` in the end.
    """

    def __init__(self, numbers: NDArray[np.int32], known: KnownRows, work: Work, parts: Parts) -> None:
        self._numbers, self._known, self._work, self._parts = numbers, known, work, parts
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

    def whole(self) -> NDArray[np.bool_]:
        """Which sequences of the work have all their rows in the parts, shape (sequences of the work,)."""
        if not len(self._starts):
            return np.zeros(0, dtype=np.bool_)
        whole: NDArray[np.bool_] = np.logical_and.reduceat(self._parts.held(self._starts), self._firsts[:-1])
        return whole

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows in order, some at a time."""
        if self._work.info.pooling == RESIDUES:
            yield from self._residues()
            return
        for first in range(0, len(self._numbers), CHUNK_ROWS):
            yield self._pooled(self._numbers[first : first + CHUNK_ROWS])

    def _pooled(self, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        places = self._known.places[numbers]
        rows = np.empty((len(numbers), self._work.info.width), dtype=np.float32)
        old, fresh = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
        if len(old):
            rows[old] = self._known.take(places[old])
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
        for number in self._numbers.tolist():
            place = int(self._known.places[number])
            if place >= 0:
                yield from self._flushed(waiting)
                rows = 0
                yield from self._known.residues(place, self._most)
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
