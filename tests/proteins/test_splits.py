"""Sites and smaller sets: what goes where, and what is promised about it."""

from __future__ import annotations

from collections import Counter

import pytest

from fedbio.errors import DataError
from fedbio.proteins import Protein, partition, partition_by, partition_iid, sample

SITES = ("site-1", "site-2", "site-3")
PROTEINS = [
    Protein(f"P{i}", "MK", ("Nucleus", "Plastid", "Cytoplasm")[i % 3], "test" if i % 10 == 9 else "train", i % 10 == 8)
    for i in range(600)
]


def shared(parts: dict[str, list[Protein]]) -> list[str]:
    return sorted(protein.id for part in parts.values() for protein in part if protein.set == "train")


@pytest.mark.parametrize("alpha", [0.01, 1.0, 1000.0])
def test_every_training_protein_goes_to_one_site_and_every_test_protein_to_all(alpha: float) -> None:
    parts = partition(PROTEINS, SITES, alpha=alpha, seed=3)
    assert tuple(parts) == SITES
    assert shared(parts) == sorted(protein.id for protein in PROTEINS if protein.set == "train")
    tests = [protein for protein in PROTEINS if protein.set == "test"]
    assert all([protein for protein in part if protein.set == "test"] == tests for part in parts.values())


def test_partition_depends_on_the_seed_alone() -> None:
    assert partition(PROTEINS, SITES, alpha=1, seed=1) == partition(PROTEINS, SITES, alpha=1, seed=1)
    assert partition(PROTEINS, SITES, alpha=1, seed=1) != partition(PROTEINS, SITES, alpha=1, seed=2)


def test_small_alpha_makes_sites_differ_and_large_alpha_makes_them_alike() -> None:
    def largest_share(alpha: float) -> float:
        parts = partition(PROTEINS, SITES, alpha=alpha, seed=0)
        classes = Counter(protein.target for protein in parts["site-1"] if protein.set == "train")
        return max(classes.values()) / sum(classes.values())

    assert largest_share(0.1) > 0.5
    assert largest_share(1000) < 0.36


@pytest.mark.parametrize("seed", range(20))
def test_no_site_is_left_empty_however_uneven_the_draw(seed: int) -> None:
    parts = partition(PROTEINS, [f"s{i}" for i in range(20)], alpha=0.001, seed=seed)
    for part in parts.values():
        assert sum(protein.set == "train" and not protein.validation for protein in part) >= 10
        assert sum(protein.validation for protein in part) >= 2


def test_few_proteins_are_shared_as_evenly_as_they_can_be() -> None:
    few = [Protein(f"P{i}", "MK", "Nucleus") for i in range(7)]
    assert sorted(map(len, partition(few, SITES, alpha=0.01, seed=0).values())) == [2, 2, 3]
    with pytest.raises(DataError, match="1 training proteins cannot be shared among 3 sites"):
        partition(few[:1], SITES, alpha=1, seed=0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="alpha is 0; a Dirichlet distribution needs alpha > 0"):
        partition(PROTEINS, SITES, alpha=0, seed=0)
    with pytest.raises(DataError, match="needs at least one, each with its own name"):
        partition(PROTEINS, ("a", "a"), alpha=1, seed=0)


def test_iid_sites_are_alike() -> None:
    parts = partition_iid(PROTEINS, SITES, seed=0)
    assert shared(parts) == sorted(protein.id for protein in PROTEINS if protein.set == "train")
    assert [sum(protein.set == "train" for protein in part) for part in parts.values()] == [180, 180, 180]


def test_a_column_keeps_its_values_together() -> None:
    kingdoms = {f"P{i}": "Fungi" if i < 300 else "Metazoa" if i < 500 else "Viridiplantae" for i in range(590)}
    parts = partition_by(PROTEINS, ("a", "b"), column=kingdoms)
    assert [sum(protein.set == "train" for protein in part) for part in parts.values()] == [270, 261]
    assert {kingdoms[protein.id] for protein in parts["a"] if protein.set == "train"} == {"Fungi"}
    with pytest.raises(DataError, match=r"3 values \(Fungi, Metazoa, Viridiplantae\) cannot make 4 sites"):
        partition_by(PROTEINS, ("a", "b", "c", "d"), column=kingdoms)


def test_sample_keeps_the_proportions_of_classes_and_splits() -> None:
    chosen = sample(PROTEINS, 90, seed=0)
    assert len(chosen) == 90
    assert Counter((protein.set, protein.validation) for protein in chosen) == {
        ("train", False): 72,
        ("train", True): 9,
        ("test", False): 9,
    }
    assert Counter(protein.target for protein in chosen) == {"Nucleus": 30, "Plastid": 30, "Cytoplasm": 30}
    assert chosen == sorted(chosen, key=PROTEINS.index)
    assert sample(PROTEINS, 90, seed=1) != chosen


def test_sample_keeps_rare_classes_and_takes_no_more_than_there_are() -> None:
    proteins = [*PROTEINS[:99], Protein("rare", "MK", "Peroxisome")]
    chosen = sample(proteins, 12, seed=0)
    assert len(chosen) == 12
    assert "rare" in {protein.id for protein in chosen}
    assert sample(proteins, 1000, seed=0) == proteins
    assert len(sample(proteins, 3, seed=0)) == 3
