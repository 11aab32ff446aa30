"""Tests of the pooling that keeps the ends, against averages over rows per residue that are made here one by one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from fedbio.embeddings import Embeddings
from fedbio.encoder import bins, embed_file
from fedbio.encoder.bins import BINS, END_BINS, START_BINS, average_bins, bins_name, find_bins
from fedbio.encoder.rows import Assembly
from fedbio.errors import DataError
from fedbio.weights import Weights, write_weights

from .conftest import TINY, WriteFasta

embed = functools.partial(embed_file, threads=1, dtype="float32")

WIDTH = TINY.width
# shorter than a bin, at its borders, on both sides of them, all bins full, and of several windows of 32
LENGTHS = [1, 5, 20, 21, 60, 61, 9, 10, 11, 39, 40, 41, 99, 100, 101, 150]


@pytest.fixture
def tiny(tmp_path: Path, tiny_weights: Weights) -> Path:
    write_weights(tmp_path / "tiny", TINY, tiny_weights)
    return tmp_path / "tiny"


def slow_ends(residues: NDArray[np.float32]) -> NDArray[np.float64]:
    """Average what a slice of the residues holds, forwards for one end and backwards for the other."""
    whole = residues.mean(axis=0, dtype=np.float64)
    averages = [whole]
    for rows, sizes in ((residues, START_BINS), (residues[::-1], END_BINS)):
        for size in sizes:
            averages.append(rows[:size].mean(axis=0, dtype=np.float64) if len(rows) else whole)
            rows = rows[size:]
    return np.concatenate(averages)


def rows_of(path: Path) -> NDArray[np.float32]:
    with Embeddings.open(path) as embeddings:
        return embeddings.rows(embeddings.ids)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("long", ["window", "cut"])
def test_ends_are_averages_of_the_rows_per_residue(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, long: Any, layer: int | None
) -> None:
    source = write_fasta(LENGTHS)
    # packs of several sizes: pieces of one protein lie in different ones
    info = embed(
        source, tmp_path / "ends.h5", encoder=tiny, pooling="ends", long=long, layer=layer, batch_residues=100
    ).encoder
    assert (info.pooling, info.width, info.bins) == ("ends", WIDTH * (1 + BINS), bins_name())
    embed(source, tmp_path / "residues.h5", encoder=tiny, pooling="residues", long=long, layer=layer)
    found = rows_of(tmp_path / "ends.h5")
    with Embeddings.open(tmp_path / "residues.h5") as embeddings:
        expected = [slow_ends(embeddings.residues(name)) for name in embeddings.ids]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
    # no two parts of the longest row are alike: each has residues of its own
    longest = found[-1].reshape(1 + BINS, WIDTH)
    assert min(np.abs(longest[k] - longest[:k]).max(axis=1).min() for k in range(1, 1 + BINS)) > 1e-3


def test_the_average_over_all_residues_is_that_of_mean_byte_for_byte(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta(LENGTHS)
    for pooling in ("mean", "ends"):
        embed(source, tmp_path / f"{pooling}.h5", encoder=tiny, pooling=pooling)
    np.testing.assert_array_equal(rows_of(tmp_path / "ends.h5")[:, :WIDTH], rows_of(tmp_path / "mean.h5"))


def test_bins_are_counted_from_the_first_residue_and_from_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bins, "START_BINS", (2, 3))
    monkeypatch.setattr(bins, "END_BINS", (1, 4))
    assert bins_name() == "start 2 3, end 1 4"
    first, last = find_bins(np.array([1, 2, 3, 5, 6, 9, 100]))
    assert [list(zip(*each, strict=True)) for each in zip(first.tolist(), last.tolist(), strict=True)] == [
        [(0, 1), (1, 1), (0, 1), (0, 0)],
        [(0, 2), (2, 2), (1, 2), (0, 1)],
        [(0, 2), (2, 3), (2, 3), (0, 2)],
        [(0, 2), (2, 5), (4, 5), (0, 4)],
        [(0, 2), (2, 5), (5, 6), (1, 5)],
        [(0, 2), (2, 5), (8, 9), (4, 8)],
        [(0, 2), (2, 5), (99, 100), (95, 99)],
    ]


def test_a_bin_without_residues_takes_the_average_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bins, "START_BINS", (2, 3))
    monkeypatch.setattr(bins, "END_BINS", (1, 4))
    # a protein of two residues, of values 1 and 3: the sum, both, none, the last, the first
    sums = np.array([[4, 4, 0, 3, 1]], dtype=np.float32)
    assert average_bins(sums, np.array([2])).tolist() == [[2, 2, 2, 3, 1]]


def test_rows_do_not_depend_on_what_else_is_embedded(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta(LENGTHS)
    embed(source, tmp_path / "all.h5", encoder=tiny, pooling="ends")
    together = rows_of(tmp_path / "all.h5")
    records = source.read_text().split(">")[1:]
    for place in (0, 4, 15):
        (tmp_path / "one.fasta").write_text(">" + records[place])
        embed(tmp_path / "one.fasta", tmp_path / f"{place}.h5", encoder=tiny, pooling="ends")
        np.testing.assert_allclose(rows_of(tmp_path / f"{place}.h5")[0], together[place], rtol=0, atol=1e-6)


def test_many_windows_are_joined_a_few_at_a_time_with_the_same_bytes(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta([150, 5, 300, 33, 70, 20, 20, 90])
    embed(source, tmp_path / "a.h5", encoder=tiny, pooling="ends")
    taken: list[int] = []
    joined = Assembly._joined_at_once

    def watched(self: Assembly, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        taken.append(len(numbers))
        return joined(self, numbers)

    monkeypatch.setattr(Assembly, "_joined_at_once", watched)
    monkeypatch.setattr("fedbio.encoder.rows._BLOCK_BYTES", 4 * 4 * WIDTH * (1 + BINS))  # four pieces
    embed(source, tmp_path / "b.h5", encoder=tiny, pooling="ends")
    assert sum(taken) == 8
    assert max(taken) < 4
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_rows_are_reused_and_other_bins_are_not_mixed_in(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = write_fasta([5, 61, 100], "old.fasta"), write_fasta([5, 61, 100, 40], "new.fasta")
    embed(old, tmp_path / "old.h5", encoder=tiny, pooling="ends")
    again = functools.partial(embed, new, encoder=tiny, pooling="ends", reuse=tmp_path / "old.h5")
    assert again(tmp_path / "new.h5").reused == 3
    np.testing.assert_array_equal(rows_of(tmp_path / "new.h5")[:3], rows_of(tmp_path / "old.h5"))
    with pytest.raises(DataError, match=r"old\.h5: made with another encoder: pooling is 'ends', not 'mean'; .*--pool"):
        embed(new, tmp_path / "mean.h5", encoder=tiny, reuse=tmp_path / "old.h5")
    before = bins_name()
    monkeypatch.setattr(bins, "START_BINS", (7, 8))
    with pytest.raises(
        DataError, match=rf"old\.h5: made with another encoder: bins is '{before}', not 'start 7 8, .*'; give the"
    ):
        again(tmp_path / "other.h5")


def test_a_file_says_its_bins_and_one_of_mean_says_nothing_of_them(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta([5, 40])
    for pooling in ("mean", "ends"):
        embed(source, tmp_path / f"{pooling}.h5", encoder=tiny, pooling=pooling)
    with h5py.File(tmp_path / "ends.h5") as file:
        assert (file.attrs["pooling"], file.attrs["bins"]) == ("ends", bins_name())
        assert file.attrs["width"] == file["embeddings"].shape[1] == WIDTH * (1 + BINS)
    # such a file was made before there were bins, and is read as ever
    with h5py.File(tmp_path / "mean.h5") as file:
        assert "bins" not in file.attrs
