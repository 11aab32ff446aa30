"""The ten locations in a cell that DeepLoc 1.0 tells apart."""

from __future__ import annotations

__all__ = ["COMPARTMENTS"]

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
