"""The tokens of the known encoders in the order of their numbers, and the file that keeps them beside weights."""

from __future__ import annotations

__all__ = ["VOCABULARIES", "VOCABULARY_FILE", "Vocabulary", "check_vocabulary", "read_pieces"]

import os
from dataclasses import dataclass
from pathlib import Path

from fedbio.errors import FormatError

VOCABULARY_FILE = "vocab.txt"
"""One token a line, as Hugging Face writes it too."""

_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of an encoder: one letter for a residue, a name in angle brackets for the others.

    Parameters
    ----------
    pieces : tuple of str
        Tokens in the order of their numbers.
    start, end, padding, mask, unknown : str
        The tokens with a task of their own.
    """

    pieces: tuple[str, ...]
    start: str
    end: str
    padding: str = "<pad>"
    mask: str = "<mask>"
    unknown: str = "<unk>"

    @property
    def text(self) -> str:
        """What `VOCABULARY_FILE` holds."""
        return "".join(f"{piece}\n" for piece in self.pieces)


def _vocabulary(text: str, *, start: str, end: str) -> Vocabulary:
    return Vocabulary(tuple(text.split()), start, end)


VOCABULARIES = {
    # BioNeMo 1.10, tokenizers/protein/esm1nv/vocab/protein_sequence.vocab
    "esm1nv": _vocabulary(
        "<unk> <s> </s> <pad> <mask> L A S G V E R T I D P K N F Q Y H M C W X B Z U O", start="<s>", end="</s>"
    ),
    # fair-esm 2.0.0, Alphabet.from_architecture("ESM-1b")
    "esm": _vocabulary(
        "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>",
        start="<cls>",
        end="<eos>",
    ),
}
"""Vocabularies by the name that `fedbio.weights.EncoderConfig.alphabet` gives."""


def read_pieces(path: str | os.PathLike[str], *, where: str | None = None) -> tuple[str, ...]:
    """Read a vocabulary file: one token a line; of a tab and what follows it nothing is kept.

    Parameters
    ----------
    path : path-like
    where : str, optional
        What messages call the file, if not by its path.

    Raises
    ------
    FormatError
        If it is too large for a vocabulary of residues, or no text.
    """
    where = where or str(path)
    if (size := Path(path).stat().st_size) > _MAX_BYTES:
        raise FormatError(f"{where}: {size:,} bytes are too many for a vocabulary of residues; was another file meant?")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not a vocabulary: not UTF-8 text; get a fresh copy") from error
    return tuple(line.partition("\t")[0].strip() for line in lines if line.strip())


def check_vocabulary(pieces: tuple[str, ...], *, where: str) -> str:
    """Return the name of a known vocabulary.

    Parameters
    ----------
    pieces : tuple of str
        Tokens in the order of their numbers.
    where : str
        The file, for the message.

    Raises
    ------
    FormatError
        If no known encoder numbers its tokens like this; the message names the first that differs.
    """
    for name, known in VOCABULARIES.items():
        if pieces == known.pieces:
            return name
    nearest = min(VOCABULARIES.values(), key=lambda known: abs(len(known.pieces) - len(pieces)))
    at = next(
        (n for n, (a, b) in enumerate(zip(pieces, nearest.pieces, strict=False)) if a != b),
        min(len(pieces), len(nearest.pieces)),
    )
    found, wanted = (repr(each[at]) if at < len(each) else "nothing" for each in (pieces, nearest.pieces))
    raise FormatError(
        f"{where}: token {at} is {found}, not {wanted}; the vocabularies that are read are those of ESM-1nv "
        f"({len(VOCABULARIES['esm1nv'].pieces)} tokens) and of ESM-1b, ESM-1v and ESM-2 "
        f"({len(VOCABULARIES['esm'].pieces)} tokens)"
    )
