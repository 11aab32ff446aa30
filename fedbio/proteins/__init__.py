"""Proteins in, checked; shared out among sites; known data sets; the demo generator."""

from __future__ import annotations

__all__ = [
    "COMPARTMENTS",
    "Protein",
    "ReadCounts",
    "check_labels",
    "partition",
    "partition_by",
    "partition_iid",
    "read",
    "sample",
    "write_fasta",
]

from fedbio.compartments import COMPARTMENTS
from fedbio.proteins.fasta import write_fasta
from fedbio.proteins.labels import check_labels
from fedbio.proteins.protein import Protein, ReadCounts
from fedbio.proteins.reading import read
from fedbio.proteins.splits import partition, partition_by, partition_iid, sample
