"""Join embeddings files of one encoder: shards of one run, or several collections, in an order that is asked for."""

from __future__ import annotations

__all__ = ["MergeReport", "Proteins", "merge"]

import array
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import Embeddings, Heads, check_same_encoder, sequence_digest, write_stream
from fedbio.embeddings.form import HEADS
from fedbio.errors import DataError, FormatError
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)

_StrPath = str | os.PathLike[str]

Proteins = Callable[[], Iterable[tuple[str, str]]]
"""Ids and sequences of a file, read anew at each call."""

OPEN_FILES = 64
"""Files that are open at the same time; thousands of shards would exceed what a process may open."""
BLOCK_ROWS = 2048
"""Rows that are read at a time: 6 MiB at width 768."""


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did, in counts.

    Parameters
    ----------
    proteins : int
        What the result holds.
    repeated : int
        Ids that stood in several files, each time for the same sequence; the first is in the result.
    left_out : int
        Proteins of the files that were not asked for.
    """

    proteins: int
    repeated: int
    left_out: int


def merge(sources: Sequence[_StrPath], output: _StrPath, *, like: Proteins | None = None) -> MergeReport:
    """Join embeddings files of one encoder, whole or not at all.

    Parameters
    ----------
    sources : sequence of path-like
        At least one. The result has their order, one after another.
    output : path-like
    like : callable, optional
        Gives the ids and sequences that the result shall hold, in its order.

    Raises
    ------
    DataError
        If the encoders differ, an id stands for two sequences, or a file lacks what `like` asks for.
    FormatError
        If one of the files is damaged.

    Notes
    -----
    Memory holds a few times `BLOCK_ROWS` rows, and of each protein some 100 bytes: neither its id nor its embedding.
    """
    with _Files(sources) as files:
        index = _Index(files)
        kept = index.without_repetitions()
        wanted = kept if like is None else index.places_of(like, kept)
        write_stream(
            output,
            info=files.info,
            proteins=len(wanted),
            heads=files.heads(kept) if like is None else _heads_of(like()),
            blocks=files.blocks(wanted),
            pointers=files.pointers(wanted),
        )
        return MergeReport(len(wanted), len(index.keys) - len(kept), len(kept) - len(wanted))


class _Files:
    """Files that are seen as one: protein after protein, file after file, with few of them open."""

    def __init__(self, paths: Sequence[_StrPath]) -> None:
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

    def __enter__(self) -> _Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
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
        return _regrouped(_only(head, chosen[start : start + len(head.ids)]) for start, head in self.numbered_heads())

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


class _Index:
    """Where ids stand, by 16 bytes of their hash."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        keys, digests = bytearray(), []
        for _, head in files.numbered_heads():
            for name in head.ids:
                keys += _key(name)
            digests.append(head.digests)
        self.keys = np.frombuffer(bytes(keys), dtype=">u8").reshape(-1, 2).astype(np.uint64)  # (n, 2)
        self.digests = np.concatenate(digests) if digests else np.empty((0, 32), dtype=np.uint8)
        self._order = np.lexsort((self.keys[:, 1], self.keys[:, 0]))
        self._firsts = self.keys[self._order, 0]

    def without_repetitions(self) -> NDArray[np.int64]:
        """Places of the proteins, ascending, without those whose id came before."""
        there = self.keys[self._order]
        again = np.flatnonzero((there[1:] == there[:-1]).all(axis=1)) + 1
        # lexsort is stable: what stands first among equals comes first in the files
        first = np.arange(len(there))
        first[again] = 0
        first = np.maximum.accumulate(first)
        pairs = sorted(zip(self._order[again].tolist(), self._order[first[again]].tolist(), strict=True))
        for place, before in pairs:
            numbers, _ = self._files.locate(np.array([place, before]))
            if numbers[0] == numbers[1]:
                name, path, _ = self._files.name(place)
                raise FormatError(f"{path}: id {name!r} stands there twice; embed the proteins again")
        other = [pair for pair in pairs if (self.digests[pair[0]] != self.digests[pair[1]]).any()]
        if other:
            name, path, _ = self._files.name(other[0][0])
            _, earlier, _ = self._files.name(other[0][1])
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            raise DataError(f"{path}: id {name!r}{more} has another sequence there than in {earlier}; rename one")
        if pairs:
            names = ", ".join(self._files.name(place)[0] for place, _ in pairs[:3])
            log.warning("ids in several files, taken from the first ids=%d such_as=%s", len(pairs), names)
        kept = np.ones(len(self.keys), dtype=bool)
        kept[[place for place, _ in pairs]] = False
        return np.flatnonzero(kept)

    def places_of(self, like: Proteins, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the proteins of another file stand, in its order."""
        chosen = np.zeros(len(self.keys), dtype=bool)
        chosen[kept] = True
        self._order = self._order[chosen[self._order]]
        self._firsts = self.keys[self._order, 0]
        places = array.array("q")
        missing: list[str] = []
        for name, sequence in like():
            place = self._find(name)
            if place is None:
                missing.append(name)
            elif self.digests[place].tobytes() == sequence_digest(sequence):
                places.append(place)
            else:
                _, path, _ = self._files.name(place)
                raise DataError(f"{path}: id {name!r} has another sequence there than in the file given with --like")
        if missing:
            raise DataError(
                f"{len(missing)} of {len(missing) + len(places)} proteins given with --like are in none of the files, "
                f"first {missing[0]!r}; embed them, or leave them out there"
            )
        return np.array(places, dtype=np.int64)

    def _find(self, name: str) -> int | None:
        high, low = np.frombuffer(_key(name), dtype=">u8").astype(np.uint64)
        near = int(np.searchsorted(self._firsts, high))
        while near < len(self._firsts) and self._firsts[near] == high:
            if self.keys[self._order[near], 1] == low:
                return int(self._order[near])
            near += 1
        return None


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _only(head: Heads, chosen: NDArray[np.bool_]) -> Heads:
    ids = [name for name, here in zip(head.ids, chosen.tolist(), strict=True) if here]
    return Heads(ids, head.lengths[chosen], head.digests[chosen])


def _heads_of(proteins: Iterable[tuple[str, str]]) -> Iterator[Heads]:
    single = (
        Heads([name], np.array([len(text)]), np.frombuffer(sequence_digest(text), dtype=np.uint8)[None])
        for name, text in proteins
    )
    return _regrouped(single)


def _regrouped(heads: Iterable[Heads]) -> Iterator[Heads]:
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
