"""The protein record that every other room works with, and what reading a file counted."""

from __future__ import annotations

__all__ = ["Protein", "ReadCounts"]

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Protein:
    """One protein.

    Parameters
    ----------
    id : str
        Unique within a file; no blanks.
    sequence : str
        Residues in upper case: the twenty standard ones and U, O, B, Z, X, J.
    target : str or None
        Its location, one of `COMPARTMENTS`, or None if it is not known.
    set : str
        ``"train"`` or ``"test"``.
    validation : bool
        True for the part of ``"train"`` that is held back to choose the best round.
    """

    id: str
    sequence: str
    target: str | None = None
    set: str = "train"
    validation: bool = False


@dataclass(slots=True)
class ReadCounts:
    """What a file held and what was accepted or left out on the way; filled while the file is read.

    Parameters
    ----------
    proteins, residues : int
        What was yielded.
    unusual : Counter of str
        Residues outside the standard twenty, by letter.
    accepted : Counter of str
        What was read leniently, by description, for example ``"records in lower case"``.
    skipped : Counter of str
        Records left out, by reason.
    examples : list of str
        The full messages of the first few records left out.
    """

    proteins: int = 0
    residues: int = 0
    unusual: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def skip(self, reason: str, message: str) -> None:
        """Count one record left out."""
        self.skipped[reason] += 1
        if len(self.examples) < 5:
            self.examples.append(message)
