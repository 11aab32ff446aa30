"""What readers and writers of embeddings files share: names, sizes, and when two encoders are the same."""

from __future__ import annotations

__all__ = [
    "CHUNK_ROWS",
    "FORMAT",
    "HEADS",
    "RESIDUES",
    "VERSION",
    "Floats",
    "Heads",
    "check_same_encoder",
    "sequence_digest",
]

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError
from fedbio.results import EncoderInfo

FORMAT = "fedbio-embeddings"
VERSION = 1
CHUNK_ROWS = 256
"""Rows of a chunk of ``/embeddings``: 768 KiB at width 768."""
HEADS = 16_384
"""Proteins whose ids, lengths and digests are read or written at once."""
RESIDUES = "residues"
"""The pooling that keeps one row per residue."""

Floats = NDArray[np.float32]

_OPTIONS = {"pooling": "--pooling", "layer": "--layer", "dtype": "--dtype", "long": "--long"}


class Heads(NamedTuple):
    """What a file says of some proteins beside their embeddings.

    Parameters
    ----------
    ids : list of str
    lengths : ndarray, shape (n,), int64
        In residues.
    digests : ndarray, shape (n, 32), uint8
        SHA-256 of each sequence.
    """

    ids: list[str]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint8]


def sequence_digest(sequence: str) -> bytes:
    """SHA-256 of a sequence in upper case, 32 bytes."""
    return hashlib.sha256(sequence.encode()).digest()


def check_same_encoder(found: EncoderInfo, wanted: EncoderInfo, *, where: str, remedy: str) -> None:
    """Refuse embeddings of another encoder.

    Raises
    ------
    DataError
        Naming each attribute that differs, both values, `remedy`, and the options of ``fedbio embed`` that would do
        as before, if these are all that differs.
    """
    differing = found.differing(wanted)
    if not differing:
        return
    what = ", ".join(f"{name} is {getattr(found, name)!r}, not {getattr(wanted, name)!r}" for name in differing)
    before = ""
    if all(name in _OPTIONS for name in differing):
        options = " ".join(f"{_OPTIONS[name]} {getattr(found, name)}" for name in differing)
        before = f" (`{options}` does as before)"
    raise DataError(f"{where}: made with another encoder: {what}; {remedy}{before}")
