"""Turn residues into token numbers with one table lookup per byte."""

from __future__ import annotations

__all__ = ["ALPHABETS", "Alphabet"]

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError
from fedbio.vocabularies import VOCABULARIES

_UNKNOWN = 255


@dataclass(frozen=True)
class Alphabet:
    """The tokens of an encoder: one letter for a residue, a name in angle brackets for the others.

    Parameters
    ----------
    pieces : tuple of str
        All tokens in the order of their numbers.
    start, end : int
        Numbers of the tokens around a protein.
    """

    pieces: tuple[str, ...]
    start: int
    end: int

    def __post_init__(self) -> None:
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        for number, piece in enumerate(self.pieces):
            if len(piece) == 1 and piece.isalpha():
                table[ord(piece)] = number
        # no published encoder knows J (leucine or isoleucine): it is read as any residue
        table[ord("J")] = table[ord("X")]
        object.__setattr__(self, "_table", table)

    def encode(self, residues: str | bytes) -> NDArray[np.uint8]:
        """Return the token numbers of residues in upper case, without start and end.

        Raises
        ------
        DataError
            If a letter is not in the alphabet.
        """
        letters = np.frombuffer(residues.encode() if isinstance(residues, str) else residues, dtype=np.uint8)
        table: NDArray[np.uint8] = self._table  # type: ignore[attr-defined]
        numbers = table[letters]
        if numbers.size and numbers.max() == _UNKNOWN:
            at = int(numbers.argmax())
            raise DataError(f"letter {chr(letters[at])!r} at residue {at + 1} is not in the encoder's alphabet")
        return numbers


ALPHABETS = {
    name: Alphabet(known.pieces, known.pieces.index(known.start), known.pieces.index(known.end))
    for name, known in VOCABULARIES.items()
}
"""Alphabets by the name that `EncoderConfig.alphabet` gives."""
