"""Know what must never be trained on: sequences, their parts and what they are part of, digests, ids."""

from __future__ import annotations

__all__ = ["Exclusion", "read_exclusion"]

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedbio.encoder.pretraining.overlap import Overlap
from fedbio.errors import DataError
from fedbio.proteins import ReadCounts, read
from fedbio.proteins.lines import read_lines

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Exclusion:
    """What is left out.

    Parameters
    ----------
    digests : frozenset of bytes
        SHA-256 of sequences in upper case.
    ids : frozenset of str
    overlap : Overlap
        Of the sequences themselves, where they were given: a fragment of a test protein is not to be learnt either,
        nor is the protein without its first methionine.
    """

    digests: frozenset[bytes] = frozenset()
    ids: frozenset[str] = frozenset()
    overlap: Overlap = field(default_factory=lambda: Overlap(()))

    def names(self, identifier: str, digest: bytes) -> bool:
        """Whether a record is named, by its sequence or its id."""
        return digest in self.digests or identifier in self.ids


def read_exclusion(sequences: Sequence[Path], ids: Sequence[Path] = ()) -> Exclusion:
    """Read what is to be left out.

    Parameters
    ----------
    sequences : sequence of Path
        Proteins in any form that `fedbio.proteins.read` reads, or lists of SHA-256 digests, one a line.
    ids : sequence of Path
        Lists of ids, one a line.

    Raises
    ------
    DataError
        If a file is missing or wrong: nothing is trained rather than too little left out.
    """
    digests: set[bytes] = set()
    known: list[bytes] = []
    for path in sequences:
        if _DIGEST.fullmatch(next(iter(_words(path)), "")):
            digests.update(_digests(path))
        else:
            known += (protein.sequence.encode() for protein in read(path, classes=None))
    digests.update(hashlib.sha256(sequence).digest() for sequence in known)
    names = {line for path in ids for line in _words(path)}
    return Exclusion(frozenset(digests), frozenset(names), Overlap(known))


def _digests(path: Path) -> Iterable[bytes]:
    for number, word in enumerate(_words(path), 1):
        if not _DIGEST.fullmatch(word):
            raise DataError(f"{path}: entry {number}: {word[:80]!r} is not a SHA-256 digest of 64 digits")
        yield bytes.fromhex(word)


def _words(path: Path) -> Iterable[str]:
    return (line.text.strip() for line in read_lines(path, ReadCounts()) if line.text.strip())
