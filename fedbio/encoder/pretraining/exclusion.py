"""Know what must never be trained on: sequences by their digest, records by their id."""

from __future__ import annotations

__all__ = ["Exclusion", "read_exclusion"]

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """

    digests: frozenset[bytes] = frozenset()
    ids: frozenset[str] = frozenset()

    def holds(self, identifier: str, digest: bytes) -> bool:
        """Whether a record is to be left out."""
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
    digests = {digest for path in sequences for digest in _digests(path)}
    names = {line for path in ids for line in _words(path)}
    return Exclusion(frozenset(digests), frozenset(names))


def _digests(path: Path) -> Iterable[bytes]:
    first = next(iter(_words(path)), "")
    if _DIGEST.fullmatch(first):
        words = list(_words(path))
        for number, word in enumerate(words, 1):
            if not _DIGEST.fullmatch(word):
                raise DataError(f"{path}: entry {number}: {word[:80]!r} is not a SHA-256 digest of 64 digits")
        return [bytes.fromhex(word) for word in words]
    proteins = read(path, classes=None)
    return (hashlib.sha256(protein.sequence.encode()).digest() for protein in proteins)


def _words(path: Path) -> Iterable[str]:
    return (line.text.strip() for line in read_lines(path, ReadCounts()) if line.text.strip())
