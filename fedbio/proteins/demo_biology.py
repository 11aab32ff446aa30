"""What is known of sorting signals and compositions, as data for the demo generator.

Counts of classes: DeepLoc 1.0 (Almagro Armenteros et al. 2017, Bioinformatics 33:3387, table 1).

Compositions: measured for this table on the training proteins of DeepLoc 1.0 (CC BY 4.0), over residues 61 to the
20th from the end and outside windows of 19 residues with a mean Kyte-Doolittle hydropathy above 1.6, so that sorting
signals and membrane helices are not counted twice. That composition follows location is an old finding (Nakashima and
Nishikawa 1994, J Mol Biol 238:54; Cedano et al. 1997, J Mol Biol 266:594; Andrade, O'Donoghue and Rost 1998,
J Mol Biol 276:517).

Substitutions: BLOSUM62 (Henikoff and Henikoff 1992, PNAS 89:10915), scores in half bits.

Regions are weighted letter pools: a letter given twice is twice as likely. Motifs give the letters allowed at each
position, separated by blanks; ``x`` leaves the residue that is there. The shares of the plans are our estimates.
"""

from __future__ import annotations

__all__ = [
    "BLOSUM62",
    "CLASS_COUNTS",
    "COMPOSITIONS",
    "ENDS",
    "MOTIFS",
    "PLANS",
    "RESIDUES",
    "STARTS",
    "Plan",
    "Region",
]

from typing import NamedTuple

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"

CLASS_COUNTS: dict[str, int] = {
    "Cell membrane": 1340,
    "Cytoplasm": 2542,
    "Endoplasmic reticulum": 862,
    "Extracellular": 1973,
    "Golgi apparatus": 356,
    "Lysosome/Vacuole": 321,
    "Mitochondrion": 1510,
    "Nucleus": 4043,
    "Peroxisome": 154,
    "Plastid": 757,
}

# per thousand, in the order of RESIDUES
COMPOSITIONS: dict[str, tuple[int, ...]] = {
    "Cell membrane": (66, 21, 50, 60, 43, 69, 26, 47, 55, 89, 20, 48, 56, 41, 55, 86, 60, 58, 15, 35),
    "Cytoplasm": (67, 17, 56, 75, 38, 59, 24, 52, 67, 96, 20, 45, 52, 45, 55, 80, 52, 61, 10, 29),
    "Endoplasmic reticulum": (61, 15, 50, 61, 52, 61, 28, 53, 59, 100, 23, 45, 49, 39, 51, 78, 55, 60, 19, 41),
    "Extracellular": (67, 30, 57, 57, 38, 85, 23, 45, 61, 72, 18, 52, 54, 39, 50, 77, 61, 59, 16, 39),
    "Golgi apparatus": (64, 16, 55, 70, 42, 54, 26, 52, 64, 97, 24, 47, 46, 44, 55, 80, 53, 59, 17, 35),
    "Lysosome/Vacuole": (65, 15, 56, 59, 47, 72, 26, 55, 56, 87, 23, 53, 46, 39, 48, 83, 56, 59, 17, 38),
    "Mitochondrion": (71, 15, 52, 67, 40, 66, 25, 56, 70, 99, 22, 43, 48, 40, 54, 71, 53, 66, 11, 31),
    "Nucleus": (65, 17, 56, 77, 34, 59, 26, 45, 72, 87, 20, 46, 58, 48, 59, 91, 51, 54, 9, 26),
    "Peroxisome": (77, 14, 51, 59, 42, 75, 23, 56, 64, 101, 20, 41, 47, 36, 50, 76, 51, 71, 14, 32),
    "Plastid": (75, 14, 58, 74, 41, 76, 17, 54, 64, 90, 21, 40, 49, 32, 52, 74, 51, 75, 13, 30),
}

# rows and columns in the order of RESIDUES
BLOSUM62: tuple[str, ...] = (
    " 4  0 -2 -1 -2  0 -2 -1 -1 -1 -1 -2 -1 -1 -1  1  0  0 -3 -2",
    " 0  9 -3 -4 -2 -3 -3 -1 -3 -1 -1 -3 -3 -3 -3 -1 -1 -1 -2 -2",
    "-2 -3  6  2 -3 -1 -1 -3 -1 -4 -3  1 -1  0 -2  0 -1 -3 -4 -3",
    "-1 -4  2  5 -3 -2  0 -3  1 -3 -2  0 -1  2  0  0 -1 -2 -3 -2",
    "-2 -2 -3 -3  6 -3 -1  0 -3  0  0 -3 -4 -3 -3 -2 -2 -1  1  3",
    " 0 -3 -1 -2 -3  6 -2 -4 -2 -4 -3  0 -2 -2 -2  0 -2 -3 -2 -3",
    "-2 -3 -1  0 -1 -2  8 -3 -1 -3 -2  1 -2  0  0 -1 -2 -3 -2  2",
    "-1 -1 -3 -3  0 -4 -3  4 -3  2  1 -3 -3 -3 -3 -2 -1  3 -3 -1",
    "-1 -3 -1  1 -3 -2 -1 -3  5 -2 -1  0 -1  1  2  0 -1 -2 -3 -2",
    "-1 -1 -4 -3  0 -4 -3  2 -2  4  2 -3 -3 -2 -2 -2 -1  1 -2 -1",
    "-1 -1 -3 -2  0 -3 -2  1 -1  2  5 -2 -2  0 -1 -1 -1  1 -1 -1",
    "-2 -3  1  0 -3  0  1 -3  0 -3 -2  6 -2  0  0  1  0 -3 -4 -2",
    "-1 -3 -1 -1 -4 -2 -2 -3 -1 -3 -2 -2  7 -1 -2 -1 -1 -2 -4 -3",
    "-1 -3  0  2 -3 -2  0 -3  1 -2  0  0 -1  5  1  0 -1 -2 -2 -1",
    "-1 -3 -2  0 -3 -2  0 -3  2 -2 -1  0 -2  1  5 -1 -1 -3 -3 -2",
    " 1 -1  0  0 -2  0 -1 -2  0 -2 -1  1 -1  0 -1  4  1 -2 -3 -2",
    " 0 -1 -1 -1 -2 -2 -2 -1 -1 -1 -1  0 -1 -1 -1  1  5  0 -2 -2",
    " 0 -1 -3 -2 -1 -3 -3  3 -2  1  1 -3 -2 -2 -3 -2  0  4 -3 -1",
    "-3 -2 -4 -3  1 -2 -2 -3 -3 -2 -1 -4 -4 -2 -3 -3 -2 -3 11  2",
    "-2 -2 -3 -2  3 -3  2 -1 -2 -1 -1 -2 -3 -1 -2 -2 -2 -1  2  7",
)


class Region(NamedTuple):
    """A stretch of `shortest` to `longest` residues from a letter pool.

    With `other`, an amphipathic helix: residues on one face (100 degrees each) come from `letters`, on the other
    from `other`. With `motif`, the last residues of the stretch follow it.
    """

    shortest: int
    longest: int
    letters: str
    other: str = ""
    motif: str = ""


HELIX = "LLLLLLIIIIVVVVAAAFFFGGMTSWYC"
BASIC = "KKRRRSNQ"
H_REGION = "LLLLLLAAAVVFIC"

STARTS: dict[str, tuple[Region, ...]] = {
    # n-, h- and c-region, small residues at -3 and -1: von Heijne 1985, J Mol Biol 184:99;
    # von Heijne 1986, Nucleic Acids Res 14:4683
    "signal peptide": (
        Region(2, 6, "KKRRSATLN"),
        Region(8, 13, H_REGION),
        Region(4, 6, "SGTQPNALE", motif="AAAVVSTC x AAAAGGSC"),
    ),
    # amphiphilic helix without acids, arginine at -2 or -3: von Heijne 1986, EMBO J 5:1335; Gavel and von Heijne 1990,
    # Protein Eng 4:33; lengths shortened from Emanuelsson et al. 2000, J Mol Biol 300:1005
    "mitochondrial transit peptide": (
        Region(14, 24, "LLLAAFVIW", other="RRRRRSSTQKAG"),
        Region(6, 10, "SSAATRGVLQ", motif="R x FYLAS AS"),
    ),
    # uncharged start, serine and threonine, then arginine; V/I-X-A/C at the cleavage site: von Heijne, Steppuhn and
    # Herrmann 1989, Eur J Biochem 180:535; Gavel and von Heijne 1990, FEBS Lett 261:455; Emanuelsson et al. 2007,
    # Nat Protoc 2:953
    "chloroplast transit peptide": (
        Region(6, 9, "AAASSSTTMLVPNQ"),
        Region(10, 18, "SSSSSSSTTTTPPAAFLKNQG"),
        Region(7, 10, "RRRSSSVVKKAGQPF", motif="VVI RKQS AC"),
    ),
    # a second, signal-peptide-like domain behind the twin arginine: Robinson and Mant 1997, Trends Plant Sci 2:431
    "thylakoid transit peptide": (
        Region(6, 9, "AAASSSTTMLVPNQ"),
        Region(8, 12, "SSSSSSSTTTTPPAAFLKNQGRR"),
        Region(4, 5, "RRKSQA", motif="R R"),
        Region(8, 12, "LLLLAAAAAVVGGI", motif="A x A"),
    ),
    # signal anchor of type II proteins; Golgi helices are shorter: Bretscher and Munro 1993, Science 261:1280
    "signal anchor": (Region(5, 12, "KKRRSTNPQEL"), Region(20, 24, HELIX)),
    "short signal anchor": (Region(5, 12, "KKRRSTNPQEL"), Region(15, 18, HELIX + "FFLL")),
    # nonapeptide near the start: Swinkels et al. 1991, EMBO J 10:3255
    "PTS2": (Region(13, 20, "HSAQTRLNEG", motif="RRK LLIV x x x x x HHQ LA"),),
    # N-myristoylation, glycine 2: Resh 1999, Biochim Biophys Acta 1451:1
    "myristoylation": (Region(7, 9, "KKSSRQNAGC"),),
}
"""What follows the first methionine."""

MOTIFS: dict[str, tuple[str, ...]] = {
    # Kalderon et al. 1984, Cell 39:499 (PKKKRKV); Chelsky et al. 1989, Mol Cell Biol 9:2487 (K-K/R-X-K/R)
    "monopartite NLS": ("P K K KR KR KR VLES", "KKRP K K KR x KR KR"),
    # two basic residues, ten to twelve others, a basic cluster: Dingwall and Laskey 1991, Trends Biochem Sci 16:478
    "bipartite NLS": (
        "K KR x x x x x x x x x x K K KR KR",
        "KR R x x x x x x x x x x x K KR K KRL",
    ),
    # leucine-rich export signal: la Cour et al. 2004, Protein Eng Des Sel 17:527
    "NES": ("LI x x LFI x x LF x LI", "L x x x LF x x L x LIV"),
    # X is not proline, T more often than S: Gavel and von Heijne 1990, Protein Eng 3:433
    "N-glycosylation site": ("N AGSLVETKFD TTTSS",),
    # Bonifacino and Traub 2003, Annu Rev Biochem 72:395
    "dileucine": ("DE x x x L LLI", "DE KRQES x PTS L LI"),
    "tyrosine signal": ("G Y x x LIVF",),
}
"""Short signals inside the chain, as alternatives of equal weight."""

ENDS: dict[str, tuple[Region, ...]] = {
    # Munro and Pelham 1987, Cell 48:899; Pelham, Hardwick and Lewis 1988, EMBO J 7:1757
    "KDEL": (Region(6, 9, "EEDDKKSGPA", motif="KKKH D E L"),),
    # dilysine of membrane proteins: Jackson, Nilsson and Peterson 1990, EMBO J 9:3153
    "KKXX": (Region(7, 9, "KRSEQTNA", motif="K K x x"),),
    # Gould et al. 1989, J Cell Biol 108:1657
    "PTS1": (Region(6, 8, "AKPRSQTVL", motif="KRPN x SSSAC KKRH LLLM"),),
    # helix near the end, short with basic flanks in mitochondria: Borgese, Colombo and Pedrazzini 2003,
    # J Cell Biol 161:1013
    "ER tail anchor": (Region(3, 5, "SNQKREST"), Region(19, 23, HELIX), Region(2, 8, "SNHPLRYG")),
    "mitochondrial tail anchor": (Region(3, 4, BASIC), Region(14, 17, "LLIVVAAGGFTSM"), Region(3, 5, "RRKKRSN")),
    # Eisenhaber, Bork and Eisenhaber 1998, Protein Eng 11:1155
    "GPI anchor": (Region(3, 3, "SNGA", motif="SNG AS AG"), Region(6, 8, "SPTGEAN"), Region(13, 17, "LLLLLAAVVFISG")),
    # farnesyl or geranylgeranyl on a C-terminal cysteine: Clarke 1992, Annu Rev Biochem 61:355
    "CaaX": (Region(10, 14, "KKKKRSSPGT", motif="C AVIL AVIL MSQAL"),),
}
"""What the chain ends with."""


class Plan(NamedTuple):
    """One way to be built, and the per cent of a compartment's families that are built so."""

    share: int
    start: str = ""
    helices: tuple[int, int] = (0, 0)
    motifs: tuple[str, ...] = ()
    end: str = ""


GLYCAN = "N-glycosylation site"

PLANS: dict[str, tuple[Plan, ...]] = {
    "Cell membrane": (
        Plan(45, helices=(2, 4), motifs=(GLYCAN,)),
        Plan(25, "signal peptide", (1, 1), (GLYCAN, GLYCAN, "dileucine")),
        Plan(10, "signal peptide", motifs=(GLYCAN,), end="GPI anchor"),
        Plan(8, "signal anchor", motifs=(GLYCAN,)),
        Plan(6, end="CaaX"),
        Plan(6, "myristoylation"),
    ),
    "Cytoplasm": (Plan(75), Plan(25, motifs=("NES",))),
    "Endoplasmic reticulum": (
        Plan(30, "signal peptide", motifs=(GLYCAN,), end="KDEL"),
        Plan(25, helices=(1, 3), end="KKXX"),
        Plan(25, helices=(2, 4)),
        Plan(15, end="ER tail anchor"),
        Plan(5),
    ),
    "Extracellular": (
        Plan(45, "signal peptide"),
        Plan(40, "signal peptide", motifs=(GLYCAN, GLYCAN)),
        Plan(15),
    ),
    "Golgi apparatus": (
        Plan(55, "short signal anchor", motifs=(GLYCAN, GLYCAN)),
        Plan(15, helices=(1, 3)),
        Plan(15, end="ER tail anchor"),
        Plan(15),
    ),
    "Lysosome/Vacuole": (
        Plan(45, "signal peptide", motifs=(GLYCAN, GLYCAN, GLYCAN, GLYCAN)),
        Plan(20, "signal peptide", (1, 1), (GLYCAN, GLYCAN, "dileucine")),
        Plan(10, "signal peptide", (1, 1), (GLYCAN, GLYCAN, "tyrosine signal")),
        Plan(20, helices=(2, 4), motifs=("dileucine",)),
        Plan(5),
    ),
    "Mitochondrion": (
        Plan(62, "mitochondrial transit peptide"),
        Plan(12, "mitochondrial transit peptide", (1, 2)),
        Plan(8, helices=(2, 3)),
        Plan(8, end="mitochondrial tail anchor"),
        Plan(10),
    ),
    "Nucleus": (
        Plan(35, motifs=("monopartite NLS",)),
        Plan(15, motifs=("monopartite NLS", "monopartite NLS")),
        Plan(30, motifs=("bipartite NLS",)),
        Plan(20),
    ),
    "Peroxisome": (
        Plan(65, end="PTS1"),
        Plan(12, "PTS2"),
        Plan(13, helices=(1, 2)),
        Plan(5, end="ER tail anchor"),
        Plan(5),
    ),
    "Plastid": (
        Plan(70, "chloroplast transit peptide"),
        Plan(10, "chloroplast transit peptide", (1, 2)),
        Plan(12, "thylakoid transit peptide"),
        Plan(8, helices=(2, 4)),
    ),
}
