"""Swiss-Prot text, UniProt XML and GenBank, and the table that maps their locations."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from fedbio.errors import FormatError
from fedbio.proteins import COMPARTMENTS, Protein, ReadCounts, read
from fedbio.proteins.annotated import LOCATIONS, compartments_of

SWISSPROT = """\
ID   CYC_HUMAN               Reviewed;          27 AA.
AC   P99999; A4D166;
DT   21-JUL-1986, integrated into UniProtKB/Swiss-Prot.
DE   RecName: Full=Cytochrome c;
GN   Name=CYCS;
OS   Homo sapiens (Human).
OC   Eukaryota; Metazoa; Chordata.
OX   NCBI_TaxID=9606;
CC   -!- FUNCTION: Electron carrier protein.
CC   -!- SUBCELLULAR LOCATION: Mitochondrion intermembrane space
CC       {ECO:0000269|PubMed:1}. Note=Loosely associated with the inner
CC       membrane. Nucleus in apoptosis.
PE   1: Evidence at protein level;
KW   Mitochondrion.
SQ   SEQUENCE   27 AA;  11749 MW;  9B1B26BC4A3F35A1 CRC64;
     MGDVEKGKKI FIMKCSQCHT VEKGGKH
//
ID   TWO_HUMAN               Reviewed;          12 AA.
AC   Q00002;
OS   Homo sapiens (Human).
CC   -!- SUBCELLULAR LOCATION: [Isoform 1]: Cytoplasm.
CC   -!- SUBCELLULAR LOCATION: [Isoform 2]: Nucleus.
SQ   SEQUENCE   12 AA;  1 MW;  9B1B26BC4A3F35A1 CRC64;
     MGDVEKGKKI FU
//
ID   NONE_HUMAN              Reviewed;           5 AA.
AC   Q00003;
OS   Homo sapiens (Human).
SQ   SEQUENCE   5 AA;  1 MW;  9B1B26BC4A3F35A1 CRC64;
     MKRLA
//
"""

UNIPROT_XML = """\
<?xml version="1.0" encoding="UTF-8"?>
<uniprot xmlns="NAMESPACE" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
<entry dataset="Swiss-Prot" created="1987-08-13" modified="2025-02-05" version="1">
<accession>P04637</accession>
<name>P53_HUMAN</name>
<protein><recommendedName><fullName>Cellular tumor antigen p53</fullName></recommendedName></protein>
<organism><name type="scientific">Homo sapiens</name><dbReference type="NCBI Taxonomy" id="9606"/></organism>
<comment type="subcellular location">
<subcellularLocation><location evidence="1">Nucleus</location></subcellularLocation>
<subcellularLocation><location>Nucleus, PML body</location></subcellularLocation>
<subcellularLocation><location>Membrane</location><topology>Lipid-anchor</topology></subcellularLocation>
</comment>
<sequence length="10" mass="1" checksum="X" modified="1990-01-01" version="1">MEEPQSDPSV</sequence>
</entry>
</uniprot>
"""

GENPEPT = """\
LOCUS       P12345                    10 aa            linear   MAM 01-JAN-2020
DEFINITION  RecName: Full=Aspartate aminotransferase, mitochondrial.
ACCESSION   P12345
VERSION     P12345.2
KEYWORDS    .
SOURCE      Oryctolagus cuniculus (rabbit)
  ORGANISM  Oryctolagus cuniculus
            Eukaryota; Metazoa.
COMMENT     [FUNCTION] Catalyzes things.
            [SUBCELLULAR LOCATION] Mitochondrion matrix
            {ECO:0000250|UniProtKB:P00505}.
            [SIMILARITY] Belongs to a family.
FEATURES             Location/Qualifiers
     source          1..10
                     /organism="Oryctolagus cuniculus"
ORIGIN
        1 mallhsgrvl
//
"""

GENBANK = """\
LOCUS       AB000001                  30 bp    DNA     linear   PLN 01-JAN-2020
DEFINITION  Two genes.
ACCESSION   AB000001
VERSION     AB000001.1
KEYWORDS    .
SOURCE      Arabidopsis thaliana
  ORGANISM  Arabidopsis thaliana
            Eukaryota; Viridiplantae.
FEATURES             Location/Qualifiers
     source          1..30
                     /organism="Arabidopsis thaliana"
     CDS             1..12
                     /protein_id="BAA00001.1"
                     /translation="MKR"
     CDS             13..24
                     /locus_tag="AT1G01010"
                     /translation="MKL"
     gene            1..12
                     /gene="one"
ORIGIN
        1 atgaaacgtt aaatgaaact ttaaaaaaaa
//
"""


def test_swissprot_text_is_read_and_its_locations_mapped(tmp_path: Path) -> None:
    path = tmp_path / "entries.dat.gz"
    path.write_bytes(gzip.compress(SWISSPROT.encode()))
    counts = ReadCounts()
    assert list(read(path, counts=counts)) == [
        Protein("P99999", "MGDVEKGKKIFIMKCSQCHTVEKGGKH", "Mitochondrion"),
        Protein("Q00002", "MGDVEKGKKIFU"),
        Protein("Q00003", "MKRLA"),
    ]
    assert counts.accepted == {
        "proteins with several compartments, read without a label": 1,
        "proteins with no location in the table, read without a label": 1,
    }


@pytest.mark.parametrize("namespace", ["http://uniprot.org/uniprot", "https://uniprot.org/uniprot"])
def test_uniprot_xml_is_read_in_the_old_and_the_new_namespace(tmp_path: Path, namespace: str) -> None:
    path = tmp_path / "entries.xml"
    path.write_text(UNIPROT_XML.replace("NAMESPACE", namespace))
    assert list(read(path)) == [Protein("P04637", "MEEPQSDPSV", "Nucleus")]


def test_genbank_proteins_and_translated_genes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "entries.gb"
    path.write_text(GENPEPT + GENBANK)
    assert list(read(path)) == [
        Protein("P12345.2", "MALLHSGRVL", "Mitochondrion"),
        Protein("BAA00001.1", "MKR"),
        Protein("AT1G01010", "MKL"),
    ]


def test_damaged_entries_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "entries"
    path.write_text(SWISSPROT[: SWISSPROT.index("PE   ")])
    with pytest.raises(FormatError, match=r"entries:12: damaged Swiss-Prot text \(Unexpected end of stream"):
        list(read(path))
    path.write_text(UNIPROT_XML.replace("NAMESPACE", "http://uniprot.org/uniprot").replace("</entry>", ""))
    with pytest.raises(FormatError, match=r"entries:15: damaged UniProt XML \(mismatched tag"):
        list(read(path))


@pytest.mark.parametrize(
    ("comment", "compartments"),
    [
        ("Nucleus {ECO:0000269|PubMed:1}. Cytoplasm {ECO:0000250}.", {"Nucleus", "Cytoplasm"}),
        ("Cell membrane {ECO:0000255}; Multi-pass membrane protein {ECO:0000255}.", {"Cell membrane"}),
        ("Cytoplasm, cytoskeleton, spindle.", {"Cytoplasm"}),
        ("Plastid, chloroplast thylakoid membrane; Peripheral membrane protein.", {"Plastid"}),
        ("Golgi apparatus, trans-Golgi network membrane.", {"Golgi apparatus"}),
        ("Endoplasmic reticulum-Golgi intermediate compartment.", set()),
        ("Membrane; Single-pass membrane protein. Endosome. Cell projection, cilium.", set()),
        ("Secreted. Note=Also found in the Nucleus. Cytoplasm.", {"Extracellular"}),
        ("[Isoform 1]: Vacuole. Note=Rare. [Isoform 2]: Lysosome membrane (By similarity).", {"Lysosome/Vacuole"}),
    ],
)
def test_comments_are_mapped(comment: str, compartments: set[str]) -> None:
    assert compartments_of(comment) == compartments


def test_the_table_reaches_all_ten_compartments() -> None:
    assert sorted(set(LOCATIONS.values())) == list(COMPARTMENTS)
    assert len(LOCATIONS) == 66
    assert all(name == name.lower().strip() for name in LOCATIONS)
