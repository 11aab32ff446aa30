"""The ten locations in a cell that DeepLoc 1.0 tells apart, and how to name others."""

from __future__ import annotations

__all__ = ["COMPARTMENTS", "named_classes"]

COMPARTMENTS: tuple[str, ...] = (
    "Cell membrane",
    "Cytoplasm",
    "Endoplasmic reticulum",
    "Extracellular",
    "Golgi apparatus",
    "Lysosome/Vacuole",
    "Mitochondrion",
    "Nucleus",
    "Peroxisome",
    "Plastid",
)
"""In alphabetical order, spelled as in its CSV form.

Almagro Armenteros et al. 2017, Bioinformatics 33:3387, doi 10.1093/bioinformatics/btx431
"""


def named_classes(names: str | None) -> tuple[str, ...]:
    """Return the classes that a command's ``--classes A,B`` names; the ten compartments if it names none."""
    return tuple(name.strip() for name in names.split(",")) if names else COMPARTMENTS
