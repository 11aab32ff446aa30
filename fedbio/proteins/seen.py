"""Remember the records of a file that came before, so that a repeated id is noticed, in little memory."""

from __future__ import annotations

__all__ = ["Before", "Seen"]

import hashlib
from array import array
from typing import NamedTuple

from fedbio.proteins.keys import KEY_BYTES, KeyTable
from fedbio.proteins.protein import Protein


class Before(NamedTuple):
    """A record that had the same id: its line, and what of it was the same."""

    line: int
    same_sequence: bool
    same_label: bool


class Seen:
    """Ids of a file, each with the digest of its sequence, its line, its label and set: about 55 bytes each."""

    def __init__(self) -> None:
        self._ids = KeyTable()
        self._sequences = bytearray()
        self._lines = array("Q")
        self._labels = array("I")
        self._known_labels: dict[tuple[str | None, str, bool], int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, protein: Protein, line: int) -> Before | None:
        """Remember a protein; return what is known of an earlier one of its id, which then stays."""
        number = self._ids.add(_digest(protein.id))
        sequence = _digest(protein.sequence)
        told = (protein.target, protein.set, protein.validation)
        label = self._known_labels.setdefault(told, len(self._known_labels))
        if number == len(self._lines):
            self._sequences += sequence
            self._lines.append(line)
            self._labels.append(label)
            return None
        place = number * KEY_BYTES
        same_sequence = self._sequences[place : place + KEY_BYTES] == sequence
        return Before(self._lines[number], same_sequence, self._labels[number] == label)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()
