"""Read proteins from any of the forms that people have, checked, lazily, with every leniency counted.

The form is found by content, never by name: FASTA, CSV or TSV, Swiss-Prot text, UniProt XML and GenBank, each plain
or gzip.
"""

from __future__ import annotations

__all__ = ["read"]

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from fedbio.compartments import COMPARTMENTS
from fedbio.errors import DataError, FormatError
from fedbio.proteins.fasta import MAX_RESIDUES, Record, fasta_records
from fedbio.proteins.labels import find_label, unknown_label
from fedbio.proteins.lines import Line, read_lines
from fedbio.proteins.protein import Protein, ReadCounts
from fedbio.proteins.seen import Seen
from fedbio.proteins.tables import LABELS, table_records

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
UNUSUAL = "UOBZXJ"
_USUAL_ONLY = re.compile(f"[{STANDARD}]+")
_ALLOWED_ONLY = re.compile(f"[{STANDARD}{UNUSUAL}]+")
_ILLEGAL = re.compile(f"[^{STANDARD}{UNUSUAL}]")
_FIX = "fix the record or pass --skip-invalid"

_SETS = {"train": ("train", None), "test": ("test", None), "val": ("train", True), "validation": ("train", True)}
_FLAGS = {"true": True, "false": False}


class _WrongRecordError(Exception):
    """One record is wrong: why, in a few words for the counts and in a sentence for the person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


LEAST_NUCLEOTIDES = 20
"""Letters from which on a sequence of A, C, G, T, U and N alone is taken for nucleotides."""


def read(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = COMPARTMENTS,
    require_labels: bool = False,
    skip_invalid: bool = False,
    counts: ReadCounts | None = None,
) -> Iterator[Protein]:
    """Yield the proteins of a file, validated, one at a time.

    Parameters
    ----------
    path : path-like
        FASTA (labels in the header as ``TARGET= SET= VALIDATION=``), CSV or TSV with FLIP's columns, Swiss-Prot
        text, UniProt XML or GenBank; plain or gzip, told apart by content.
    labels : path-like, optional
        A CSV or TSV with the columns ``id`` and ``target`` (and ``set``, ``validation``), joined by id.
    classes : sequence of str or None
        The labels that are known; None takes all as they are.
    require_labels : bool
        Refuse a protein without a label.
    skip_invalid : bool
        Leave wrong records out, and count them, instead of refusing the file.
    counts : ReadCounts, optional
        Filled while reading; complete when the iterator is exhausted.

    Yields
    ------
    Protein

    Raises
    ------
    DataError
        ``path:line: record 'id': what is wrong; what to do``.
    FormatError
        If the file is damaged or of an unknown form.

    Notes
    -----
    The same record given twice is yielded once; the same id with another sequence, label or set is refused. Since
    the file is read lazily, an error in its last line comes after the proteins before it. Of each protein about 55
    bytes are kept; a table of labels is kept whole.
    """
    tally = ReadCounts() if counts is None else counts
    lines = read_lines(path, tally)
    beside = _read_labels(labels) if labels is not None else None
    seen = Seen()
    joined = nucleotides = 0
    first_id = ""
    for record in _records(lines, path, tally):
        try:
            if beside is not None:
                joined += _join(record, beside, labels)
                first_id = first_id or record.id
            protein = _check(record, tally, classes)
            if require_labels and protein.target is None:
                raise _WrongRecordError(
                    "no label", "has no label; add TARGET= to the header, give a table with --labels, or leave it out"
                )
            if _repeats(protein, record.line, seen):
                tally.accepted["records given twice"] += 1
                continue
        except _WrongRecordError as wrong:
            message = f"{path}:{record.line}: record {record.id!r}: {wrong}"
            if not skip_invalid:
                raise DataError(message) from None
            tally.skip(wrong.reason, message)
            continue
        tally.proteins += 1
        tally.residues += len(protein.sequence)
        # seen from its ends: most proteins say at their first residue that they are none
        nucleotides += len(protein.sequence) >= LEAST_NUCLEOTIDES and not protein.sequence.strip("ACGTUN")
        yield protein
    if not len(seen):
        left_out = sum(tally.skipped.values())
        raise DataError(
            "\n  ".join([f"{path}: no valid protein in the file, all {left_out} are wrong, such as:", *tally.examples])
            if left_out
            else f"{path}: no protein in the file; was it written or copied completely?"
        )
    if nucleotides == len(seen):
        raise DataError(
            f"{path}: every sequence is made of A, C, G, T, U and N alone, so these are nucleotides; translate them to "
            "proteins first"
        )
    if beside is not None and not joined:
        raise DataError(
            f"{labels}: none of its {len(beside)} ids is one of {path}: {next(iter(beside), '')!r} there, {first_id!r} "
            "here; give it the first words of the headers as ids"
        )


def _records(lines: Iterator[Line], path: str | os.PathLike[str], counts: ReadCounts) -> Iterator[Record]:
    """Find out the form from the first line that says something, and take the file apart."""
    for first in lines:
        if first.text.startswith(";"):
            counts.accepted["comment lines"] += 1
        elif first.text.strip():
            break
    else:
        return iter(())
    lines = itertools.chain([first], lines)
    if first.text.startswith(">"):
        return fasta_records(lines, counts)
    if first.text.startswith(("ID   ", "LOCUS ", "<?xml", "<uniprot")):
        from fedbio.proteins.annotated import annotated_records  # Biopython is needed for these alone

        return annotated_records(lines, first.text, path, counts)
    if any(mark in first.text for mark in ",;\t") or first.text.strip().lower() == "sequence":
        return table_records(lines, path, counts=counts)
    if re.fullmatch(r"[A-Za-z*\s-]+", first.text):
        raise FormatError(
            f"{path}:{first.number}: a sequence without a header before it; a FASTA record begins with '>' and an id"
        )
    raise FormatError(
        f"{path}:{first.number}: neither FASTA (a line '>id') nor a table with a column 'sequence', nor Swiss-Prot, "
        "UniProt XML or GenBank; check what file this is"
    )


def _read_labels(path: str | os.PathLike[str]) -> dict[str, Record]:
    beside: dict[str, Record] = {}
    for record in table_records(read_lines(path, ReadCounts()), path, needs=LABELS):
        known = beside.setdefault(record.id, record)
        if (known.target, known.set, known.validation) != (record.target, record.set, record.validation):
            raise DataError(
                f"{path}:{record.line}: record {record.id!r}: another label or set than in line {known.line}; keep one"
            )
    return beside


def _join(record: Record, beside: Mapping[str, Record], labels: str | os.PathLike[str] | None) -> bool:
    """Take label and set from the table, if it has them; ``sp|P12345|NAME`` is also found by its accession."""
    found = beside.get(record.id)
    if found is None and record.id.count("|") == 2:
        found = beside.get(record.id.split("|")[1])
    if found is None:
        return False
    for field in ("target", "set", "validation"):
        here, there = getattr(record, field), getattr(found, field)
        if here is not None and there is not None and here != there:
            raise _WrongRecordError(
                f"{field} contradicts the labels file",
                f"{field} is {here!r} here and {there!r} in {labels}:{found.line}; keep one of them",
            )
        setattr(record, field, there if there is not None else here)
    return True


def _check(record: Record, counts: ReadCounts, classes: Sequence[str] | None) -> Protein:
    """Return the validated protein, or raise `_WrongRecordError`."""
    if not record.id:
        raise _WrongRecordError(
            "no id", "has no id; put a name after '>' without a blank between, or fill the id column"
        )
    if not record.id.isprintable() or " " in record.id:
        raise _WrongRecordError(
            "blank or control character in the id", "the id holds a blank or a control character; rename it"
        )
    sequence = _check_sequence(record.sequence, counts)
    target = _check_target(record.target, counts, classes)
    part, implied = _SETS.get((record.set or "train").lower(), (None, None))
    if part is None:
        raise _WrongRecordError("unknown set", f"SET is {record.set!r}; allowed are 'train' and 'test'")
    flag = _FLAGS.get(record.validation.lower()) if record.validation is not None else bool(implied)
    if flag is None:
        raise _WrongRecordError(
            "unknown validation flag", f"VALIDATION is {record.validation!r}; allowed are True and False"
        )
    if flag and part == "test":
        raise _WrongRecordError(
            "validation in the test set", "is in the test set and flagged for validation; choose one"
        )
    return Protein(record.id, sequence, target, part, flag or bool(implied))


def _check_sequence(sequence: str, counts: ReadCounts) -> str:
    if not sequence:
        raise _WrongRecordError("no sequence", f"has a header and no sequence; {_FIX}")
    if len(sequence) > MAX_RESIDUES:
        raise _WrongRecordError("too long", f"has more than {MAX_RESIDUES:,} residues; check what file this is")
    if _USUAL_ONLY.fullmatch(sequence):
        return sequence
    if sequence.endswith("*"):
        sequence = sequence.rstrip("*")
        counts.accepted["stops ('*') at the end"] += 1
    upper = sequence.upper() if sequence.isascii() else sequence
    if upper != sequence:
        counts.accepted["records with lower-case letters"] += 1
    if not _ALLOWED_ONLY.fullmatch(upper):
        raise _wrong_letter(upper)
    for letter in UNUSUAL:
        if number := upper.count(letter):
            counts.unusual[letter] += number
    return upper


def _wrong_letter(sequence: str) -> _WrongRecordError:
    if not sequence:
        return _WrongRecordError("no sequence", f"has a stop and no sequence; {_FIX}")
    match = _ILLEGAL.search(sequence)
    assert match is not None
    letter, position = match.group(), match.start() + 1
    if letter in "-.~":
        return _WrongRecordError("gap", f"gap {letter!r} at residue {position}: this is an alignment; remove the gaps")
    if letter == "*":
        return _WrongRecordError("stop inside", f"stop '*' at residue {position}, before the end; {_FIX}")
    name = {"\0": "a NUL byte", " ": "a blank"}.get(letter, f"letter {letter!r}")
    return _WrongRecordError("illegal letter", f"{name} at residue {position} is not an amino acid; {_FIX}")


def _check_target(target: str | None, counts: ReadCounts, classes: Sequence[str] | None) -> str | None:
    if target is None or not target.strip():
        return None
    if classes is None:
        return target
    label = find_label(target, classes)
    if label is None:
        if ";" in target:
            raise _WrongRecordError(
                "several locations",
                f"not yet: {target!r} names several locations and this release takes one location per protein; "
                "keep the proteins with one, or pass --skip-invalid to leave the others out",
            )
        raise _WrongRecordError("unknown label", unknown_label(target, classes))
    if label != target.replace("_", " "):
        counts.accepted[f"label {target!r} read as {label!r}"] += 1
    return label


def _repeats(protein: Protein, line: int, seen: Seen) -> bool:
    """Say whether the protein came before; refuse the id if it came with something else."""
    before = seen.add(protein, line)
    if before is None:
        return False
    if not before.same_sequence:
        raise _WrongRecordError(
            "id given twice", f"the id comes in line {before.line} with another sequence; give each protein its own id"
        )
    if not before.same_label:
        raise _WrongRecordError(
            "label given twice", f"comes in line {before.line} with another label or set; keep one of them"
        )
    return True
