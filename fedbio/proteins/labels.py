"""Turn a location as people write it into one of the ten compartments, or say which one was meant.

A label is accepted in any case, with ``_`` for a blank (the spelling of FLIP's FASTA files), and by the synonyms of
`SYNONYMS`; the reader counts every respelling but the ``_``. Anything else is refused, with the nearest known label.
"""

from __future__ import annotations

__all__ = ["SYNONYMS", "check_labels", "find_label", "suggest_label"]

import difflib
import functools
from collections.abc import Iterable, Sequence

from fedbio.compartments import COMPARTMENTS
from fedbio.errors import DataError
from fedbio.proteins.protein import Protein

SYNONYMS: dict[str, str] = {
    "cell surface membrane": "Cell membrane",
    "plasma membrane": "Cell membrane",
    "cytosol": "Cytoplasm",
    "er": "Endoplasmic reticulum",
    "extracellular space": "Extracellular",
    "secreted": "Extracellular",
    "golgi": "Golgi apparatus",
    "golgi complex": "Golgi apparatus",
    "lysosome": "Lysosome/Vacuole",
    "lysosome vacuole": "Lysosome/Vacuole",
    "vacuole": "Lysosome/Vacuole",
    "mitochondria": "Mitochondrion",
    "nuclear": "Nucleus",
    "peroxisomal": "Peroxisome",
    "chloroplast": "Plastid",
}
"""Other names that are read as a compartment, in lower case; the whole list, nothing else is guessed."""


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").split()).lower()


def find_label(text: str, classes: Sequence[str] = COMPARTMENTS) -> str | None:
    """Return the class that `text` spells, or None.

    Examples
    --------
    >>> find_label("Cell_membrane"), find_label("cytosol"), find_label("Nucleuss")
    ('Cell membrane', 'Cytoplasm', None)
    """
    return text if text in classes else _respelled(text, tuple(classes))


@functools.lru_cache(maxsize=1024)
def _respelled(text: str, classes: tuple[str, ...]) -> str | None:
    plain = _plain(text)
    by_plain = {_plain(name): name for name in classes}
    synonym = SYNONYMS.get(plain)
    return by_plain.get(plain) or (synonym if synonym in classes else None)


def suggest_label(text: str, classes: Sequence[str] = COMPARTMENTS) -> str | None:
    """Return the class whose name or synonym is nearest to `text`, or None if none is near.

    Examples
    --------
    >>> suggest_label("Nuclues"), suggest_label("Cell wall of yeast")
    ('Nucleus', None)
    """
    spellings = {_plain(name): name for name in classes}
    spellings |= {synonym: name for synonym, name in SYNONYMS.items() if name in classes}
    near = difflib.get_close_matches(_plain(text), spellings, n=1, cutoff=0.7)
    return spellings[near[0]] if near else None


def unknown_label(text: str, classes: Sequence[str] = COMPARTMENTS) -> str:
    """Say that `text` is no class, and which one it may have meant."""
    near = suggest_label(text, classes)
    hint = f"did you mean {near!r}?" if near else f"the locations are {', '.join(classes)}"
    return f"label {text!r} is not a known location; {hint}"


def check_labels(proteins: Iterable[Protein], classes: Sequence[str], *, source: str) -> None:
    """Refuse labelled proteins whose label is not among `classes`.

    Parameters
    ----------
    proteins : iterable of Protein
    classes : sequence of str
        The classes that the federation trains on.
    source : str
        Where the proteins come from, for the message.

    Raises
    ------
    DataError
        Naming the first protein with another label, and the nearest class.
    """
    known = set(classes)
    for protein in proteins:
        if protein.target is not None and protein.target not in known:
            raise DataError(f"{source}: record {protein.id!r}: {unknown_label(protein.target, classes)}")
