from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedbio.classifier import Residues, Standardizer, load_site_data, merge_sites, moments
from fedbio.embeddings import Embeddings
from fedbio.errors import DataError
from fedbio.proteins import Protein

WriteResidues = Callable[..., tuple[Path, Path]]
MakeResidues = Callable[[list[Protein]], list[NDArray[np.float32]]]


@pytest.fixture
def store(write_residues: WriteResidues, varied: list[Protein]) -> Iterator[Embeddings]:
    with Embeddings.open(write_residues("site-1", varied)[1]) as store:
        yield store


def _read(residues: Residues, places: list[int], *, gap: int) -> NDArray[np.float32]:
    where = np.array(places, dtype=np.int64)
    rows = np.full((int(residues.lengths[where].sum()) + gap * (len(places) + 1), 6), 7, dtype=np.float32)
    residues.read(where, rows, gap=gap)
    return rows


def test_proteins_are_read_one_after_the_other_with_gaps(
    store: Embeddings, varied: list[Protein], residues: MakeResidues
) -> None:
    found = Residues.of(store, ["p30", "p7", "p60"], most=1000)
    assert found.shape == (3, 6)
    gap = np.full((2, 6), 7, dtype=np.float32)
    sixty, thirty = residues([varied[60], varied[30]])
    assert np.array_equal(_read(found, [2, 0], gap=2), np.concatenate([gap, sixty, gap, thirty, gap]))


def test_of_a_long_protein_both_ends_are_read(store: Embeddings, varied: list[Protein], residues: MakeResidues) -> None:
    (whole,) = residues([varied[7]])
    assert len(whole) == 58
    for most, kept in ((57, [*range(29), *range(30, 58)]), (10, [*range(5), *range(53, 58)]), (None, [*range(58)])):
        found = Residues.of(store, ["p7"], most=most)
        assert found.lengths.tolist() == [len(kept)]
        assert np.array_equal(_read(found, [0], gap=0), whole[kept])


def test_sums_and_standardization_are_those_of_all_residues_that_are_read(
    store: Embeddings, varied: list[Protein], residues: MakeResidues
) -> None:
    found = Residues.of(store, [each.id for each in varied], most=20)
    read = np.concatenate([np.concatenate([one[:10], one[-10:]]) if len(one) > 20 else one for one in residues(varied)])
    sums = moments(found)
    assert sums.count == len(read)
    np.testing.assert_allclose(sums.total, read.sum(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(sums.squares, (read.astype(np.float64) ** 2).sum(axis=0), rtol=1e-6)
    standardized = _read(Standardizer.fit(found).apply(found), [*range(90)], gap=0)
    np.testing.assert_allclose(standardized, Standardizer.fit(read).apply(read), atol=1e-5)


def test_means_are_those_of_each_protein(store: Embeddings, varied: list[Protein], residues: MakeResidues) -> None:
    found = Residues.of(store, ["p3", "p50"], most=1000)
    expected = [one.mean(axis=0) for one in residues([varied[3], varied[50]])]
    np.testing.assert_allclose(found.means(), expected, rtol=1e-5)
    assert found[[]].means().shape == (0, 6)


def test_merged_sites_read_each_protein_from_its_own_file(
    write_residues: WriteResidues, varied: list[Protein], residues: MakeResidues, classes: tuple[str, ...]
) -> None:
    parts = [
        load_site_data(*write_residues(name, proteins), classes)
        for name, proteins in (("site-1", varied[:50]), ("site-2", varied[40:]))
    ]
    merged = merge_sites(parts)
    assert len(merged) == 90
    assert isinstance(merged.train.features, Residues)
    by_id = {each.id: each for each in varied}
    place = merged.train.ids.index("p80")
    (expected,) = residues([by_id["p80"]])
    assert np.array_equal(_read(merged.train.features, [place], gap=0), expected)
    ids = [*merged.train.ids, *merged.validation.ids, *merged.test.ids]
    assert sorted(ids) == sorted(by_id)


def test_a_pooled_file_and_a_missing_protein_are_refused(
    write_site: Callable[..., tuple[Path, Path]], proteins: list[Protein], store: Embeddings
) -> None:
    with pytest.raises(DataError, match=r"site-1\.h5: 1 of 2 proteins have no embedding, first 'p99'"):
        Residues.of(store, ["p1", "p99"], most=1000)
    with pytest.raises(DataError, match=r"site-1\.h5: record 'p2' has no residues; embed"):
        store.pointers = np.where(np.arange(91) == 3, store.pointers[2], store.pointers)
        Residues.of(store, ["p1", "p2"], most=1000)
    with (
        Embeddings.open(write_site("pooled", proteins)[1]) as pooled,
        pytest.raises(DataError, match=r"pooled\.h5: has one row per protein.*embed with `--pooling residues`"),
    ):
        Residues.of(pooled, ["p1"], most=1000)
