"""Every form that is accepted, every form that is refused, each with its message."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import pytest

from fedbio.errors import DataError, FormatError
from fedbio.proteins import Protein, ReadCounts, read, write_fasta

TWO = [Protein("P1", "MKRKRPAS", "Nucleus"), Protein("P2", "MASSTVLK", "Cell membrane", "test")]
TWO_FASTA = b">P1 TARGET=Nucleus SET=train VALIDATION=False\nMKRKRPAS\n>P2 TARGET=Cell_membrane SET=test\nMASSTVLK\n"
TWO_CSV = b"id,sequence,target,set,validation\nP1,MKRKRPAS,Nucleus,train,False\nP2,MASSTVLK,Cell membrane,test,\n"

SAME_PROTEINS = {
    "plain": TWO_FASTA,
    "gzip": gzip.compress(TWO_FASTA),
    "gzip of two members": gzip.compress(TWO_FASTA[:40]) + gzip.compress(TWO_FASTA[40:]),
    "Windows line ends": TWO_FASTA.replace(b"\n", b"\r\n"),
    "byte order mark": b"\xef\xbb\xbf" + TWO_FASTA,
    "no newline at the end": TWO_FASTA.rstrip(),
    "lower case": TWO_FASTA.replace(b"MKRKRPAS", b"mkrkrpas"),
    "wrapped lines": TWO_FASTA.replace(b"MKRKRPAS", b"MKR\nKRPA\n\nS"),
    "comments": b";made by hand\n" + TWO_FASTA.replace(b"MKRKRPAS", b"MKRK\n; half\nRPAS"),
    "stop at the end": TWO_FASTA.replace(b"MKRKRPAS", b"MKRKRPAS*"),
    "blanks at the end": TWO_FASTA.replace(b"MKRKRPAS", b"MKRKRPAS  \t"),
    "record given twice": TWO_FASTA + TWO_FASTA,
    "label with a blank": TWO_FASTA.replace(b"Cell_membrane", b"Cell membrane"),
    "label in lower case": TWO_FASTA.replace(b"Cell_membrane", b"cell membrane"),
    "synonym": TWO_FASTA.replace(b"Cell_membrane", b"plasma membrane"),
    "tags in another order": TWO_FASTA.replace(
        b"TARGET=Nucleus SET=train", b"OS=Homo sapiens SET=train TARGET=Nucleus"
    ),
    "CSV": TWO_CSV,
    "CSV, gzip, Windows line ends": gzip.compress(TWO_CSV.replace(b"\n", b"\r\n")),
    "TSV": TWO_CSV.replace(b",", b"\t"),
    "CSV with semicolons": TWO_CSV.replace(b",", b";"),
    "CSV with other columns, in capitals": b"SEQUENCE,Kingdom,ID,Target,Set\n"
    b'MKRKRPAS,"Fungi, others",P1,Nucleus,\n\nMASSTVLK,,P2,Cell_membrane,test\n',
}


@pytest.mark.parametrize("content", SAME_PROTEINS.values(), ids=SAME_PROTEINS)
def test_every_accepted_form_gives_the_same_proteins(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "named.anything"
    path.write_bytes(content)
    assert list(read(path)) == TWO


@pytest.mark.parametrize(
    ("form", "counted"),
    [
        ("plain", {}),
        ("Windows line ends", {"lines with Windows ends": 4}),
        ("byte order mark", {"byte order mark": 1}),
        ("no newline at the end", {"no newline at the end": 1}),
        ("lower case", {"records with lower-case letters": 1}),
        ("comments", {"comment lines": 2}),
        ("stop at the end", {"stops ('*') at the end": 1}),
        ("blanks at the end", {"lines with blanks at the end": 1}),
        ("record given twice", {"records given twice": 2}),
        ("synonym", {"label 'plasma membrane' read as 'Cell membrane'": 1}),
    ],
)
def test_leniency_is_counted(tmp_path: Path, form: str, counted: dict[str, int]) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(SAME_PROTEINS[form])
    counts = ReadCounts()
    assert len(list(read(path, counts=counts))) == counts.proteins == 2
    assert counts.residues == 16
    assert counts.accepted == counted


def test_unusual_residues_are_kept_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">P1\nMUOBZXJXX\n")
    counts = ReadCounts()
    assert [protein.sequence for protein in read(path, counts=counts)] == ["MUOBZXJXX"]
    assert counts.unusual == {"U": 1, "O": 1, "B": 1, "Z": 1, "X": 3, "J": 1}


def test_validation_can_be_a_set_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">P1 SET=val\nMK\n>P2 SET=train VALIDATION=true\nMK\n")
    assert list(read(path)) == [Protein("P1", "MK", None, "train", True), Protein("P2", "MK", None, "train", True)]


def test_rows_without_an_id_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "flip.csv"
    path.write_bytes(b"sequence,target,set,validation\nMK,Nucleus,train,True\nMR,Plastid,test,\n")
    assert list(read(path)) == [
        Protein("Sequence0", "MK", "Nucleus", "train", True),
        Protein("Sequence1", "MR", "Plastid", "test", False),
    ]


def test_a_million_residues_are_one_protein(tmp_path: Path) -> None:
    path = tmp_path / "long.fasta"
    path.write_bytes(b">short\nMK\n>long\n" + b"MKRA" * 250_000 + b"\n>single\nM\n")
    assert [len(protein.sequence) for protein in read(path)] == [2, 1_000_000, 1]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(TWO_FASTA + b">P3\nM7\n")
    proteins = read(path)
    assert next(proteins).id == "P1"
    assert next(proteins).id == "P2"
    with pytest.raises(DataError, match="letter '7'"):
        next(proteins)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    proteins = [*TWO, Protein("sp|Q9|Ä", "MX", "Lysosome/Vacuole", "train", True), Protein("P4", "MKU")]
    path = tmp_path / "folder" / "proteins.fasta"
    assert write_fasta(proteins, path) == 4
    assert path.read_text().splitlines()[2] == ">P2 TARGET=Cell_membrane SET=test VALIDATION=False"
    assert list(read(path)) == proteins


# one file per way to be wrong, and what is said about it; {path} stands for the file's path
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "{path}: the file is empty; was it written or copied completely?"),
    "blank": (b"\n\n", "{path}: no protein in the file; was it written or copied completely?"),
    "header only": (b"sequence,target\n", "{path}: no protein in the file; was it written or copied completely?"),
    "binary": (bytes(range(256)) * 20, "{path}: this is a binary file, not FASTA or CSV; check the path"),
    "truncated gzip": (
        gzip.compress(TWO_FASTA)[:-12],
        "{path}: the gzip file ends too early; copy or download it again",
    ),
    "gzip with a wrong CRC": (
        gzip.compress(TWO_FASTA)[:-8] + b"\0\1\2\3" + gzip.compress(TWO_FASTA)[-4:],
        "{path}: the gzip file is damaged (CRC check failed 0x3020100 != "
        f"{hex(zlib.crc32(TWO_FASTA))}); copy or download it again",
    ),
    "gzip bomb": (
        gzip.compress(b">P1\n" + (b"A" * 1_000_000 + b"\n") * 70),
        "{path}: the gzip file expands to more than 67,108,864 bytes, 200 times its size, which no set of proteins "
        "does; unpack it by hand if you trust it",
    ),
    "zip": (
        b"PK\x03\x04....",
        "{path}: this is a zip archive (or a spreadsheet), not FASTA or CSV; unpack it, or save the sheet as CSV",
    ),
    "UTF-16 with its mark": (
        TWO_FASTA.decode().encode("utf-16"),
        "{path}: this is UTF-16 text, not FASTA or CSV; save it as UTF-8",
    ),
    "UTF-16 without": (
        TWO_FASTA.decode().encode("utf-16-le"),
        "{path}: this is UTF-16 text, not FASTA or CSV; save it as UTF-8",
    ),
    "Latin-1": (b">P1\nMK\n>\xc4\nMK\n", "{path}:3: byte 0xC4 is not UTF-8 text; save the file as UTF-8"),
    "bare CR": (
        b">P1\rMK\r>P2\rMK\r",
        "{path}: lines end with a bare CR (old Macintosh text); convert them with 'mac2unix'",
    ),
    "one endless line": (
        b">P1\n" + b"A" * (16 * 2**20 + 1),
        "{path}:2: a line of more than 16,777,216 bytes is no protein; check what file this is",
    ),
    "too long": (
        b">P1\n" + (b"A" * 1_000_000 + b"\n") * 11,
        "{path}:1: record 'P1': has more than 10,000,000 residues; check what file this is",
    ),
    "no form": (
        b"hello 123\n",
        "{path}:1: neither FASTA (a line '>id') nor a table with a column 'sequence', nor Swiss-Prot, UniProt XML or "
        "GenBank; check what file this is",
    ),
    "sequence without a header": (
        b"MKRKRPAS\n>P2\nMK\n",
        "{path}:1: a sequence without a header before it; a FASTA record begins with '>' and an id",
    ),
    "header without a sequence": (
        b">P1\n>P2\nMK\n",
        "{path}:1: record 'P1': has a header and no sequence; fix the record or pass --skip-invalid",
    ),
    "last header without a sequence": (
        b">P1\nMK\n>P2\n",
        "{path}:3: record 'P2': has a header and no sequence; fix the record or pass --skip-invalid",
    ),
    "stop only": (
        b">P1\n*\n",
        "{path}:1: record 'P1': has a stop and no sequence; fix the record or pass --skip-invalid",
    ),
    "no id": (
        b"> P1\nMK\n",
        "{path}:1: record '': has no id; put a name after '>' without a blank between, or fill the id column",
    ),
    "id with a blank": (
        b"id,sequence\nP 1,MK\n",
        "{path}:2: record 'P 1': the id holds a blank or a control character; rename it",
    ),
    "id twice": (
        b">P1\nMK\n>P1\nMR\n",
        "{path}:3: record 'P1': the id comes in line 1 with another sequence; give each protein its own id",
    ),
    "label twice": (
        b">P1 TARGET=Nucleus\nMK\n>P1 TARGET=Plastid\nMK\n",
        "{path}:3: record 'P1': comes in line 1 with another label or set; keep one of them",
    ),
    "digit": (
        b">P1\nMK7R\n",
        "{path}:1: record 'P1': letter '7' at residue 3 is not an amino acid; fix the record or pass --skip-invalid",
    ),
    "letter of another alphabet": (
        ">P1\nMKß\n".encode(),
        "{path}:1: record 'P1': letter 'ß' at residue 3 is not an amino acid; fix the record or pass --skip-invalid",
    ),
    "NUL": (
        b">P1\nMK\0R\n" + TWO_FASTA,
        "{path}:1: record 'P1': a NUL byte at residue 3 is not an amino acid; fix the record or pass --skip-invalid",
    ),
    "blank inside": (
        b">P1\nMK R\n",
        "{path}:1: record 'P1': a blank at residue 3 is not an amino acid; fix the record or pass --skip-invalid",
    ),
    "gap": (
        b">P1\nMK--R\n",
        "{path}:1: record 'P1': gap '-' at residue 3: this is an alignment; remove the gaps",
    ),
    "stop inside": (
        b">P1\nMK*R\n",
        "{path}:1: record 'P1': stop '*' at residue 3, before the end; fix the record or pass --skip-invalid",
    ),
    "misspelt label": (
        b">P1 TARGET=Nuclues\nMK\n",
        "{path}:1: record 'P1': label 'Nuclues' is not a known location; did you mean 'Nucleus'?",
    ),
    "unknown label": (
        b">P1 TARGET=Flagellum\nMK\n",
        "{path}:1: record 'P1': label 'Flagellum' is not a known location; the locations are Cell membrane, Cytoplasm, "
        "Endoplasmic reticulum, Extracellular, Golgi apparatus, Lysosome/Vacuole, Mitochondrion, Nucleus, Peroxisome, "
        "Plastid",
    ),
    "several labels": (
        b"id,sequence,target,set,validation,partition\nP1,MK,Nucleus;Cytoplasm,train,False,0\n",
        "{path}:2: record 'P1': not yet: 'Nucleus;Cytoplasm' names several locations and this release takes one "
        "location per protein; keep the proteins with one, or pass --skip-invalid to leave the others out",
    ),
    "wrong set": (
        b">P1 SET=tset\nMK\n",
        "{path}:1: record 'P1': SET is 'tset'; allowed are 'train' and 'test'",
    ),
    "wrong validation flag": (
        b">P1 SET=train VALIDATION=maybe\nMK\n",
        "{path}:1: record 'P1': VALIDATION is 'maybe'; allowed are True and False",
    ),
    "validation in the test set": (
        b">P1 SET=test VALIDATION=True\nMK\n",
        "{path}:1: record 'P1': is in the test set and flagged for validation; choose one",
    ),
    "table without sequences": (
        b"id,target\nP1,Nucleus\n",
        "{path}:1: no column 'sequence' among 'id', 'target'; a table needs the columns sequence, target, set and "
        "validation (FLIP's form, with id if there are names)",
    ),
    "nucleotides": (
        b">g1\nACGTACGTACGTACGTACGTNNACGT\n>g2\nacguacguacguacguacguacgu\n",
        "{path}: every sequence is made of A, C, G, T, U and N alone, so these are nucleotides; translate them to "
        "proteins first",
    ),
    "row with a missing cell": (
        b"id,sequence,target\nP1,MK,Nucleus\nP2,MK\n",
        "{path}:3: 2 cells where the header has 3; a cell that holds the separator needs double quotes around it",
    ),
    "open quote": (
        b'id,sequence\n"P1,MK\n',
        "{path}:2: unexpected end of data; check the quotes in this row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_refused_form_has_its_message(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "proteins"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert str(caught.value) == message.format(path=path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.fasta: no such file; check the path"):
        list(read(tmp_path / "absent.fasta"))
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        list(read(tmp_path))


def test_skip_invalid_leaves_wrong_records_out_and_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">A\nMK7\n>B\nMK-\n>C\n>D TARGET=Nuclues\nMK\n" + TWO_FASTA + b">P1\nMKL\n")
    counts = ReadCounts()
    assert list(read(path, skip_invalid=True, counts=counts)) == TWO
    assert counts.skipped == {"illegal letter": 1, "gap": 1, "no sequence": 1, "unknown label": 1, "id given twice": 1}
    assert counts.examples[1] == f"{path}:3: record 'B': gap '-' at residue 3: this is an alignment; remove the gaps"


def test_a_file_with_wrong_records_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">A\nMK7\n")
    with pytest.raises(DataError, match=r"no valid protein in the file, all 1 are wrong, such as:\n  .*letter '7'"):
        list(read(path, skip_invalid=True))


def test_labels_come_from_a_table_beside_the_sequences(tmp_path: Path) -> None:
    fasta, table = tmp_path / "proteins.fasta", tmp_path / "labels.tsv"
    fasta.write_bytes(b">P1\nMKRKRPAS\n>sp|P2|NAME_HUMAN\nMASSTVLK\n>P3\nMK\n")
    table.write_bytes(b"id\ttarget\tset\nP2\tPlastid\ttest\nP1\tNucleus\t\nP9\tNucleus\t\n")
    assert list(read(fasta, labels=table)) == [
        Protein("P1", "MKRKRPAS", "Nucleus"),
        Protein("sp|P2|NAME_HUMAN", "MASSTVLK", "Plastid", "test"),
        Protein("P3", "MK"),
    ]


def test_table_of_labels_for_other_proteins_is_refused(tmp_path: Path) -> None:
    fasta, table = tmp_path / "proteins.fasta", tmp_path / "labels.csv"
    fasta.write_bytes(b">P1 first\nMKRKRPAS\n>P2\nMASSTVLK\n")
    table.write_bytes(b"id,target\nQ1,Nucleus\nQ2,Plastid\n")
    with pytest.raises(DataError) as caught:
        list(read(fasta, labels=table))
    assert str(caught.value) == (
        f"{table}: none of its 2 ids is one of {fasta}: 'Q1' there, 'P1' here; give it the first words of the headers "
        "as ids"
    )


def test_table_of_labels_needs_ids_and_targets(tmp_path: Path) -> None:
    fasta, table = tmp_path / "proteins.fasta", tmp_path / "labels.csv"
    fasta.write_bytes(b">P1\nMKRKRPAS\n")
    table.write_bytes(b"id,compartment\nP1,Nucleus\n")
    with pytest.raises(FormatError, match=r"no column 'target' among 'id', 'compartment'; a table of labels needs"):
        list(read(fasta, labels=table))


def test_protein_of_four_kinds_of_residues_is_one_among_others(tmp_path: Path) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_bytes(b">P1\n" + b"ACGT" * 10 + b"\n>P2\nMKRKRPAS\n")
    assert [protein.id for protein in read(fasta)] == ["P1", "P2"]


def test_missing_labels_are_refused_where_they_are_required(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">P1\nMK\n")
    with pytest.raises(DataError, match=r"proteins\.fasta:1: record 'P1': has no label; add TARGET= to the header"):
        list(read(path, require_labels=True))


def test_a_label_that_contradicts_the_table_is_refused(tmp_path: Path) -> None:
    fasta, table = tmp_path / "proteins.fasta", tmp_path / "labels.csv"
    fasta.write_bytes(b">P1 TARGET=Nucleus\nMK\n")
    table.write_bytes(b"id,target\nP1,Plastid\n")
    with pytest.raises(DataError, match=r"target is 'Nucleus' here and 'Plastid' in .*labels\.csv:2"):
        list(read(fasta, labels=table))
    table.write_bytes(b"id,target\nP1,Plastid\nP1,Nucleus\n")
    with pytest.raises(DataError, match=r"labels\.csv:3: record 'P1': another label or set than in line 2"):
        list(read(fasta, labels=table))


def test_labels_are_held_to_the_classes_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">P1 TARGET=Plastid\nMK\n")
    with pytest.raises(
        DataError, match="label 'Plastid' is not a known location; the locations are Cytoplasm, Nucleus"
    ):
        list(read(path, classes=("Cytoplasm", "Nucleus")))
