"""Read again what an encoder was trained on, by its account, without the code that packed it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import lzma
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 12
POWERS = np.uint64(32) ** np.arange(WINDOW, dtype=np.uint64)

OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


class Banned:
    """Sequences that must not be trained on, whole or in part.

    Parameters
    ----------
    sequences : collection of bytes
    parts : bool
        Whether to know their parts as well, and what has one of them as a part, of 12 residues or more.
    """

    def __init__(self, sequences: Collection[bytes] = (), *, parts: bool = True) -> None:
        self.digests = {hashlib.sha256(each).digest() for each in sequences}
        long = [each for each in sequences if parts and len(each) >= WINDOW]
        self._text = b"\n".join(long)
        self._windows = np.unique(_numbers(self._text))
        self._firsts: dict[int, list[bytes]] = {}
        for each in long:
            self._firsts.setdefault(int(_numbers(each[:WINDOW])[0]), []).append(each)
        self._sorted = np.array(sorted(self._firsts), dtype=np.uint64)

    def overlap(self, sequence: bytes) -> bool:
        """Whether a sequence is a part of one of these, or has one of them as a part."""
        numbers = _numbers(sequence)
        if not len(numbers) or not self._firsts:
            return False
        if _among(numbers[-1:], self._windows)[0] and sequence in self._text:
            return True
        begins = np.flatnonzero(_among(numbers, self._sorted)).tolist()
        return any(sequence.startswith(each, begin) for begin in begins for each in self._firsts[int(numbers[begin])])


def _numbers(sequence: bytes) -> NDArray[np.uint64]:
    letters = np.frombuffer(sequence, dtype=np.uint8).astype(np.uint64) % 32
    if len(letters) < WINDOW:
        return letters[:0]
    numbers: NDArray[np.uint64] = np.lib.stride_tricks.sliding_window_view(letters, WINDOW) @ POWERS
    return numbers


def _among(numbers: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
    among: NDArray[np.bool_] = known[places] == numbers
    return among


@dataclass
class TrainingList:
    """What the files and the rules of an account come to; `found` has how many of the digests to look for are in it."""

    proteins: int = 0
    residues: int = 0
    excluded: int = 0
    excluded_parts: int = 0
    twins: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    found: int = 0

    def leaves_out(self, sequence: bytes, digest: bytes, banned: Banned) -> bool:
        """Whether a sequence must not be trained on, which is counted."""
        whole = digest in banned.digests
        part = not whole and banned.overlap(sequence)
        self.excluded += whole
        self.excluded_parts += part
        return whole or part


def read_again(
    corpus: Mapping[str, Any], folder: Path, *, banned: Banned, looked_for: Set[bytes] = frozenset()
) -> TrainingList:
    """Go through the very files that an account names, which are known by their SHA-256, one protein at a time.

    Parameters
    ----------
    corpus : mapping
        ``corpus`` of a ``training.json``.
    folder : Path
        Where the files are, plain or ``.xz``.
    banned : Banned
        What must not be trained on: left out and counted.
    looked_for : set of bytes
        SHA-256 of sequences to count in the list.
    """
    again = TrainingList()
    held_out: set[bytes] = set()
    for source in corpus["valid_sources"]:
        for sequence in _sequences(folder, source):
            digest = hashlib.sha256(sequence).digest()
            if not again.leaves_out(sequence, digest, banned):
                held_out.add(digest)
    for source in corpus["sources"]:
        for sequence in _sequences(folder, source):
            digest = hashlib.sha256(sequence).digest()
            if again.leaves_out(sequence, digest, banned):
                continue
            if digest in held_out:
                again.twins += 1
            elif not _falls_out(sequence, corpus["seed"], corpus["valid_fraction"]):
                again.proteins += 1
                again.residues += len(sequence)
                again.digest.update(sequence + b"\n")
                again.found += digest in looked_for
    return again


def check_account(corpus: Mapping[str, Any], again: TrainingList) -> None:
    """Fail unless the run has trained on this list, which has nothing in it that was banned."""
    assert corpus["excluded"] == again.excluded, "another number of banned proteins was left out"
    assert corpus["excluded_parts"] == again.excluded_parts, "another number of their parts was left out"
    assert corpus["held_out_twins"] == again.twins
    assert (corpus["proteins"]["train"], corpus["residues"]["train"]) == (again.proteins, again.residues)
    assert corpus["sha256"]["train"] == again.digest.hexdigest(), "the run has trained on another list"


def _falls_out(sequence: bytes, seed: int, fraction: float) -> bool:
    digest = hashlib.sha256(seed.to_bytes(8, "little") + sequence).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def _sequences(folder: Path, source: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the sequences of a file; fail at its end if it was not the one that was meant."""
    packed = folder / f"{source['name']}.xz"
    parts: list[bytes] = []
    with _open(packed) if packed.exists() else open(folder / source["name"], "rb") as file:
        hashed = _Hashed(file)
        lines = io.BufferedReader(hashed, 1 << 20)
        for line in gzip.GzipFile(fileobj=lines) if source["name"].endswith(".gz") else lines:
            if line.startswith(b">"):
                yield from _joined(parts)
                parts = []
            else:
                parts.append(line.strip())
        yield from _joined(parts)
    assert hashed.sha256.hexdigest() == source["sha256"], f"{source['name']} is not the file that was trained on"


class _Hashed(io.RawIOBase):
    """A file of which every byte that is read is hashed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        return count


def _joined(parts: list[bytes]) -> list[bytes]:
    return [b"".join(parts).upper().removesuffix(b"*")] if parts else []


def _open(path: Path) -> Any:
    return OPENERS.get(path.suffix, open)(path, "rb")


def table_sequences(path: Path) -> dict[str, set[bytes]]:
    """Sequences of a table in FLIP's form, by ``train``, ``validation`` and ``test``."""
    found: dict[str, set[bytes]] = {"train": set(), "validation": set(), "test": set()}
    with contextlib.closing(io.TextIOWrapper(_open(path), newline="")) as file:
        for row in csv.DictReader(file):
            part = "validation" if row["validation"] == "True" else row["set"]
            found[part].add(row["sequence"].upper().encode())
    return found
