"""Join embeddings files of one encoder: shards of one run, or several collections, in an order that is asked for."""

from __future__ import annotations

__all__ = ["MergeReport", "Proteins", "merge"]

import array
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import Heads, sequence_digest, write_stream
from fedbio.embeddings_joined import JoinedFiles, regrouped
from fedbio.errors import DataError, FormatError

log = logging.getLogger(__name__)

_StrPath = str | os.PathLike[str]

Proteins = Callable[[], Iterable[tuple[str, str]]]
"""Ids and sequences of a file, read anew at each call."""


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
    Memory holds a few thousand rows, and of each protein some 150 bytes: neither its id nor its embedding.
    """
    with JoinedFiles(sources) as files:
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


class _Index:
    """Where ids stand, by 16 bytes of their hash."""

    def __init__(self, files: JoinedFiles) -> None:
        self._files = files
        count = int(files.starts[-1])
        self.keys = np.empty((count, 2), dtype=np.uint64)
        self.digests = np.empty((count, 32), dtype=np.uint8)
        for place, head in files.numbered_heads():
            here = slice(place, place + len(head.ids))
            self.keys[here] = np.frombuffer(b"".join(map(_key, head.ids)), dtype=">u8").reshape(-1, 2)
            self.digests[here] = head.digests
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


def _heads_of(proteins: Iterable[tuple[str, str]]) -> Iterator[Heads]:
    single = (
        Heads([name], np.array([len(text)]), np.frombuffer(sequence_digest(text), dtype=np.uint8)[None])
        for name, text in proteins
    )
    return regrouped(single)
