"""Read Swiss-Prot text, UniProt XML and GenBank with Biopython, and map their locations to the ten compartments.

UniProt names several hundred locations. `LOCATIONS` lists those that belong to one of the ten compartments; the first
part of a location counts (``Cytoplasm, cytoskeleton`` is ``Cytoplasm``), topology and notes do not:

=======================  =============================================================================================
compartment              UniProt locations
=======================  =============================================================================================
Cell membrane            Cell membrane, Apical, Apicolateral, Basal, Basolateral and Lateral cell membrane,
                         Synaptic, Presynaptic and Postsynaptic cell membrane
Cytoplasm                Cytoplasm
Endoplasmic reticulum    Endoplasmic reticulum (with membrane, lumen), Rough and Smooth endoplasmic reticulum (with
                         membrane, lumen), Sarcoplasmic reticulum (with membrane, lumen), Microsome (with membrane)
Extracellular            Secreted
Golgi apparatus          Golgi apparatus (with membrane, lumen)
Lysosome/Vacuole         Lysosome and Vacuole (with membrane, lumen), Vacuole matrix, Prevacuolar compartment, Lytic
                         vacuole, Protein storage vacuole (each with membrane)
Mitochondrion            Mitochondrion (with membrane, inner and outer membrane, intermembrane space, matrix, envelope),
                         Mitosome, Hydrogenosome
Nucleus                  Nucleus (with membrane, inner and outer membrane, envelope, matrix, lamina), Chromosome
Peroxisome               Peroxisome (with membrane, matrix), Glyoxysome (with membrane, matrix), Glycosome
Plastid                  Plastid
=======================  =============================================================================================

**The single-location rule.** A protein gets a label when all its locations in the table are in one compartment.
Locations outside the table (``Membrane``, ``Endosome``, ``Cell projection`` ...) are passed over. A protein with
none in the table, or with several compartments, is read without a label; both are counted. Locations of all
isoforms count, whatever their evidence. All proteins are in the training set: nothing in these files says otherwise.
"""

from __future__ import annotations

__all__ = ["LOCATIONS", "annotated_records", "compartments_of"]

import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from fedbio.errors import FormatError, MachineError
from fedbio.proteins.fasta import Record
from fedbio.proteins.lines import Line
from fedbio.proteins.protein import ReadCounts


def _with(names: str, parts: str) -> list[str]:
    """Return each name alone and with each of the parts after it."""
    return [
        f"{name} {part}".strip().lower()
        for name in names.split(", ")
        for part in ("", *filter(None, parts.split(", ")))
    ]


_BY_COMPARTMENT: dict[str, list[str]] = {
    "Cell membrane": _with(
        "Cell membrane, Apical cell membrane, Apicolateral cell membrane, Basal cell membrane, "
        "Basolateral cell membrane, Lateral cell membrane, Synaptic cell membrane, Presynaptic cell membrane, "
        "Postsynaptic cell membrane",
        "",
    ),
    "Cytoplasm": _with("Cytoplasm", ""),
    "Endoplasmic reticulum": _with(
        "Endoplasmic reticulum, Rough endoplasmic reticulum, Smooth endoplasmic reticulum, Sarcoplasmic reticulum",
        "membrane, lumen",
    )
    + _with("Microsome", "membrane"),
    "Extracellular": _with("Secreted", ""),
    "Golgi apparatus": _with("Golgi apparatus", "membrane, lumen"),
    "Lysosome/Vacuole": _with("Lysosome, Vacuole", "membrane, lumen")
    + _with("Vacuole matrix", "")
    + _with("Prevacuolar compartment, Lytic vacuole, Protein storage vacuole", "membrane"),
    "Mitochondrion": _with(
        "Mitochondrion", "membrane, inner membrane, outer membrane, intermembrane space, matrix, envelope"
    )
    + _with("Mitosome, Hydrogenosome", ""),
    "Nucleus": _with("Nucleus", "membrane, inner membrane, outer membrane, envelope, matrix, lamina")
    + _with("Chromosome", ""),
    "Peroxisome": _with("Peroxisome, Glyoxysome", "membrane, matrix") + _with("Glycosome", ""),
    "Plastid": _with("Plastid", ""),
}

LOCATIONS: dict[str, str] = {name: place for place, names in _BY_COMPARTMENT.items() for name in names}
"""The compartment of each UniProt location, by its name in lower case."""

_EVIDENCE = re.compile(r"\{[^}]*\}|\((?:By similarity|Probable|Potential)\)")
_NOTE = re.compile(r"Note=.*?(?=\[[^\]]*\]:|$)", re.DOTALL)
_MOLECULE = re.compile(r"\[[^\]]*\]:")
_GENPEPT = re.compile(r"\[SUBCELLULAR LOCATION\](.*?)(?=\[[A-Z][A-Z ,/-]+\]|$)", re.DOTALL)


def compartments_of(comment: str) -> set[str]:
    """Return the compartments that a subcellular-location comment of UniProt names.

    Examples
    --------
    >>> compartments_of("Nucleus, nucleolus {ECO:0000269|PubMed:1}. Membrane; Single-pass membrane protein.")
    {'Nucleus'}
    """
    text = " ".join(comment.split())
    for pattern in (_EVIDENCE, _NOTE, _MOLECULE):
        text = pattern.sub(" ", text)
    return _mapped(re.split(r"\.(?:\s|$)", text))


def _mapped(locations: Iterable[str]) -> set[str]:
    first_parts = (re.split("[,;]", location)[0].strip().lower() for location in locations)
    return {LOCATIONS[part] for part in first_parts if part in LOCATIONS}


def annotated_records(
    lines: Iterator[Line], first: str, path: str | os.PathLike[str], counts: ReadCounts
) -> Iterator[Record]:
    """Yield one raw record per protein; from a GenBank file of nucleotides, one per translated coding sequence.

    Parameters
    ----------
    lines : iterator of Line
        All lines of the file.
    first : str
        The first of them: it tells the form.
    path : path-like
        For messages.
    counts : ReadCounts
        ``accepted`` receives the proteins left without a label, by reason.

    Raises
    ------
    FormatError
        If Biopython cannot read the file, with the line it had come to.
    MachineError
        If Biopython is not installed.
    """
    try:
        from Bio import SeqIO, SwissProt
    except ImportError as error:
        raise MachineError(f"{path}: reading this form needs Biopython; 'pip install biopython'") from error
    stream = _LineStream(lines)
    entries: Iterator[tuple[str, str, set[str]]]
    if first.startswith("ID "):
        form, entries = "Swiss-Prot text", map(_from_swissprot, SwissProt.parse(stream))  # type: ignore[no-untyped-call]
    elif first.startswith("LOCUS "):
        parsed = SeqIO.parse(stream, "genbank")  # type: ignore[no-untyped-call]
        form, entries = "GenBank", (found for entry in parsed for found in _from_genbank(entry))
    else:
        parsed = SeqIO.parse(_ByteStream(stream), "uniprot-xml")  # type: ignore[no-untyped-call]
        form, entries = "UniProt XML", map(_from_uniprot_xml, parsed)
    while True:
        line = stream.number + 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Biopython remarks on date and locus forms; we read neither
                found = next(entries, None)
        except (ValueError, SyntaxError, AssertionError, IndexError, KeyError) as error:
            raise FormatError(
                f"{path}:{stream.number}: damaged {form} ({error}); download or export the file again"
            ) from error
        if found is None:
            return
        identifier, sequence, places = found
        if len(places) > 1:
            counts.accepted["proteins with several compartments, read without a label"] += 1
        elif not places:
            counts.accepted["proteins with no location in the table, read without a label"] += 1
        yield Record(line, identifier, sequence, target=places.pop() if len(places) == 1 else None)


def _from_swissprot(entry: Any) -> tuple[str, str, set[str]]:
    head = "SUBCELLULAR LOCATION:"
    comments = [comment.removeprefix(head) for comment in entry.comments if comment.startswith(head)]
    return entry.accessions[0], entry.sequence, set().union(*map(compartments_of, comments))


def _from_uniprot_xml(entry: Any) -> tuple[str, str, set[str]]:
    return entry.id, str(entry.seq), _mapped(entry.annotations.get("comment_subcellularlocation_location", ()))


def _from_genbank(entry: Any) -> Iterator[tuple[str, str, set[str]]]:
    if entry.annotations.get("molecule_type") == "protein":
        comments = _GENPEPT.findall(" ".join(entry.annotations.get("comment", "").split()))
        yield entry.id, str(entry.seq), set().union(*map(compartments_of, comments))
        return
    for feature in entry.features:
        if feature.type == "CDS" and (translation := feature.qualifiers.get("translation")):
            names = [name for key in ("protein_id", "locus_tag", "gene") for name in feature.qualifiers.get(key, ())]
            yield names[0] if names else f"{entry.id}:{feature.location}", translation[0], set()


class _LineStream(io.TextIOBase):
    """A text file made of lines that knows how many it has given out."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.number = 0

    def readline(self, _size: int | None = -1, /) -> str:  # type: ignore[override]
        line = next(self._lines, None)
        if line is None:
            return ""
        self.number = line.number
        return f"{line.text}\n"

    def read(self, size: int | None = -1, /) -> str:
        return "" if size == 0 else self.readline()


class _ByteStream:
    """The same lines as bytes, for the XML parser, in the namespace that Biopython knows."""

    def __init__(self, lines: _LineStream) -> None:
        self._lines = lines

    def read(self, size: int = -1) -> bytes:
        # UniProt's files of 2025 name their namespace with https, which Biopython 1.88 refuses
        return (
            b"" if size == 0 else self._lines.readline().replace("https://uniprot.org/", "http://uniprot.org/").encode()
        )
