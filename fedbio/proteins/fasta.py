"""Take FASTA apart into raw records, and write proteins as FASTA."""

from __future__ import annotations

__all__ = ["MAX_RESIDUES", "Record", "fasta_records", "write_fasta"]

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedbio.files import whole_file
from fedbio.proteins.lines import Line
from fedbio.proteins.protein import Protein, ReadCounts

MAX_RESIDUES = 10_000_000
"""Three hundred times the longest known protein (titin, 34,350): beyond it a record is no protein."""

TAG = re.compile(r"\b(TARGET|SET|VALIDATION)=(.*?)(?=\s+[A-Za-z]+=|\s*$)")
"""The tags of FLIP and biotrainer; a value ends before the next ``KEY=``, so it may hold blanks."""


@dataclass(slots=True)
class Record:
    """One record as the file has it, before any check; None where the file says nothing."""

    line: int
    id: str
    sequence: str
    target: str | None = None
    set: str | None = None
    validation: str | None = None


def fasta_records(lines: Iterator[Line], counts: ReadCounts) -> Iterator[Record]:
    """Yield one raw record per ``>`` header; the first line is one.

    Comments (``;``) and empty lines are passed over, blanks at line ends are cut.
    """
    record: Record | None = None
    parts: list[str] = []
    length = 0
    for line in lines:
        text = line.text.rstrip()
        if text.startswith(">"):
            if record is not None:
                record.sequence = "".join(parts)
                yield record
            record, parts, length = _header(line.number, text), [], 0
        elif text.startswith(";"):
            counts.accepted["comment lines"] += 1
        elif text:
            if text != line.text:
                counts.accepted["lines with blanks at the end"] += 1
            # What exceeds the bound is not kept: the reader refuses the record, and memory stays bounded.
            if length <= MAX_RESIDUES:
                parts.append(text)
            length += len(text)
    if record is not None:
        record.sequence = "".join(parts)
        yield record


def _header(number: int, text: str) -> Record:
    identifier, _, description = text[1:].partition(" ")
    if "\t" in identifier:
        identifier, _, description = text[1:].partition("\t")
    tags = dict(TAG.findall(description)) if "=" in description else {}
    return Record(number, identifier, "", tags.get("TARGET"), tags.get("SET"), tags.get("VALIDATION"))


def write_fasta(proteins: Iterable[Protein], path: str | os.PathLike[str]) -> int:
    """Write proteins as FASTA in the form of FLIP and biotrainer, whole or not at all.

    A header is ``>id TARGET=Cell_membrane SET=train VALIDATION=False``; an unlabelled protein has no ``TARGET``.

    Parameters
    ----------
    proteins : iterable of Protein
    path : path-like
        Where the file shall appear.

    Returns
    -------
    int
        How many proteins were written.
    """
    count = 0
    with whole_file(path) as beside, open(beside, "w", encoding="utf-8", newline="\n", buffering=1 << 20) as file:
        for protein in proteins:
            label = f"TARGET={protein.target.replace(' ', '_')} " if protein.target else ""
            file.write(f">{protein.id} {label}SET={protein.set} VALIDATION={protein.validation}\n{protein.sequence}\n")
            count += 1
    return count
