"""The demo generator: size, seed, homology, signals, speed and difficulty."""

from __future__ import annotations

import re
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedbio.errors import DataError
from fedbio.proteins import COMPARTMENTS, Protein, partition, read, write_fasta
from fedbio.proteins.demo import LONGEST, SHORTEST, generate
from fedbio.proteins.demo_biology import BLOSUM62, CLASS_COUNTS, COMPOSITIONS, PLANS, RESIDUES


@pytest.fixture(scope="module")
def proteins() -> list[Protein]:
    return list(generate(6000, seed=7))


def family(protein: Protein) -> str:
    return protein.id.partition(".")[0]


def share(proteins: list[Protein], target: str, pattern: str) -> float:
    chosen = [protein.sequence for protein in proteins if protein.target == target]
    return sum(bool(re.search(pattern, sequence)) for sequence in chosen) / len(chosen)


def test_the_tables_are_whole() -> None:
    assert tuple(CLASS_COUNTS) == tuple(COMPOSITIONS) == tuple(PLANS) == COMPARTMENTS
    assert sum(CLASS_COUNTS.values()) == 13_858
    assert all(sum(plan.share for plan in plans) == 100 for plans in PLANS.values())
    assert all(980 <= sum(composition) <= 1020 for composition in COMPOSITIONS.values())
    scores = np.array([row.split() for row in BLOSUM62], dtype=int)
    assert scores.shape == (20, 20)
    assert (scores == scores.T).all()


@pytest.mark.parametrize("count", [1, 7, 900])
def test_any_number_can_be_made(count: int, tmp_path: Path) -> None:
    made = list(generate(count, seed=0))
    assert len({protein.id for protein in made}) == count
    write_fasta(made, tmp_path / "demo.fasta")
    assert list(read(tmp_path / "demo.fasta", require_labels=True)) == made


def test_batches_follow_one_another(tmp_path: Path) -> None:
    assert len({protein.id for protein in generate(20_050, seed=0)}) == 20_050


def test_the_seed_decides(proteins: list[Protein]) -> None:
    assert list(generate(6000, seed=7)) == proteins
    assert list(islice(generate(6000, seed=8), 5)) != proteins[:5]


def test_proteins_are_short_and_begin_with_methionine(proteins: list[Protein]) -> None:
    lengths = [len(protein.sequence) for protein in proteins]
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= LONGEST
    assert 90 < np.mean(lengths) < 110
    assert all(protein.sequence[0] == "M" and set(protein.sequence) <= set(RESIDUES) for protein in proteins)


def test_classes_have_deeplocs_proportions(proteins: list[Protein]) -> None:
    counts = Counter(protein.target for protein in proteins)
    assert counts["Nucleus"] == 1750
    assert counts["Peroxisome"] == 67
    splits = Counter((protein.set, protein.validation) for protein in proteins)
    assert splits["test", False] == pytest.approx(1200, abs=40)
    assert splits["train", True] == pytest.approx(600, abs=40)
    assert {protein.target for protein in proteins if protein.set == "test"} == set(COMPARTMENTS)


def test_a_family_has_one_class_one_split_and_similar_sequences(proteins: list[Protein]) -> None:
    families: dict[str, list[Protein]] = {}
    for protein in proteins:
        families.setdefault(family(protein), []).append(protein)
    assert 2.5 < len(proteins) / len(families) < 3.5
    assert all(
        len({(member.target, member.set, member.validation) for member in members}) == 1
        for members in families.values()
    )

    def identity(one: str, other: str) -> float:
        # four-letter words in common: near zero between strangers
        words = [{text[i : i + 4] for i in range(len(text) - 3)} for text in (one, other)]
        return len(words[0] & words[1]) / min(map(len, words))

    pairs = [members[:2] for members in families.values() if len(members) > 1][:300]
    relatives = [identity(one.sequence, other.sequence) for one, other in pairs]
    strangers = [identity(one[0].sequence, other[0].sequence) for one, other in pairwise(pairs)]
    assert np.mean(relatives) > 0.1
    assert np.mean(strangers) < 0.01


@pytest.mark.parametrize(
    ("target", "pattern", "share_with", "share_without"),
    [
        ("Endoplasmic reticulum", "[KH]DEL$", 0.2, 0.01),
        ("Peroxisome", "[SAC][KRH][LM]$", 0.5, 0.03),
        ("Nucleus", "K[KR].[KR]", 0.6, 0.4),
        ("Lysosome/Vacuole", "N[^P][ST]", 0.7, 0.7),
        ("Extracellular", "^M.{2,6}[LAVFICMGTSW]{8}", 0.4, 0.1),
        ("Cell membrane", "[LIVAFGMTSWYC]{16}", 0.3, 0.02),
    ],
)
def test_signals_are_where_they_belong(
    proteins: list[Protein], target: str, pattern: str, share_with: float, share_without: float
) -> None:
    assert share(proteins, target, pattern) > share_with
    assert share(proteins, "Cytoplasm", pattern) < share_without


def test_transit_peptides_have_their_compositions(proteins: list[Protein]) -> None:
    def start(target: str, letters: str) -> float:
        starts = [protein.sequence[1:21] for protein in proteins if protein.target == target]
        return float(np.mean([sum(map(begin.count, letters)) / 20 for begin in starts]))

    assert start("Plastid", "ST") > 0.3 > start("Cytoplasm", "ST")
    assert start("Mitochondrion", "DE") < 0.06 < start("Cytoplasm", "DE")
    assert start("Mitochondrion", "R") > 1.5 * start("Cytoplasm", "R")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="0 demo proteins cannot be made"):
        next(generate(0, seed=0))
    with pytest.raises(DataError, match="difficulty is 2; allowed is 0 to 1"):
        next(generate(1, seed=0, difficulty=2))
    with pytest.raises(DataError, match="leave nothing to train on"):
        next(generate(1, seed=0, test_fraction=0.8, validation_fraction=0.2))


def residue_frequencies(proteins: list[Protein]) -> tuple[np.ndarray, list[str | None]]:
    codes = [np.array([RESIDUES.index(residue) for residue in protein.sequence]) for protein in proteins]
    features = np.array([np.bincount(code, minlength=20) / len(code) for code in codes])
    return features[:, :-1], [protein.target for protein in proteins]  # the last follows from the others


def accuracy(train: list[Protein], test: list[Protein]) -> float:
    model = LinearDiscriminantAnalysis().fit(*residue_frequencies(train))
    return float(model.score(*residue_frequencies(test)))


def test_a_site_alone_learns_something_and_all_together_clearly_more() -> None:
    made = list(generate(900, seed=1))
    # test proteins of another seed: more of them, and no relatives
    test = list(generate(2000, seed=2))
    together = accuracy([protein for protein in made if protein.set == "train"], test)
    alone = [
        accuracy([protein for protein in part if protein.set == "train"], test)
        for part in partition(made, ("a", "b", "c"), alpha=1.0, seed=0).values()
    ]
    assert min(alone) > 0.4
    assert np.mean(alone) + 0.05 < together
    assert 0.6 < together < 0.85


def test_difficulty_takes_composition_away() -> None:
    easy, hard = (
        accuracy(list(generate(1500, seed=1, difficulty=level)), list(generate(1500, seed=2, difficulty=level)))
        for level in (0.0, 1.0)
    )
    assert easy > 0.75
    assert hard < 0.55


@pytest.mark.slow
def test_a_million_proteins_are_written_within_a_minute(tmp_path: Path) -> None:
    started = time.perf_counter()
    assert write_fasta(generate(1_000_000, seed=0), tmp_path / "million.fasta") == 1_000_000
    assert time.perf_counter() - started < 60
