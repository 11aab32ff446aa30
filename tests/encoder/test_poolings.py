"""Tests of what becomes of residues: poolings, layers and windows against the slow reference, and rows per residue."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedbio.embeddings import Embeddings, sequence_digest
from fedbio.encoder import embed_file, room
from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.packs import make_plan
from fedbio.errors import DataError, MachineError
from fedbio.weights import Weights, write_weights

from .conftest import TINY, WriteFasta, slow_encoder

embed = functools.partial(embed_file, threads=1, dtype="float32")

LENGTHS = [50, 10, 33, 100, 32]


@pytest.fixture
def tiny(tmp_path: Path, tiny_weights: Weights) -> Path:
    write_weights(tmp_path / "tiny", TINY, tiny_weights)
    return tmp_path / "tiny"


def slow_windows(weights: Weights, residues: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each window the vectors of the residues that count there, and that of the start token."""
    plan = make_plan([len(residues)], max_residues=32, windows=True, budget=1)
    order = np.argsort(plan.begin)
    windows = []
    for piece in order.tolist():
        begin = int(plan.begin[piece])
        tokens = np.array([1, *ALPHABETS["esm1nv"].encode(residues[begin : plan.end[piece]]), 2])
        hidden = slow_encoder(TINY, weights, tokens)
        windows.append((hidden[1 + plan.pool_begin[piece] - begin : 1 + plan.pool_end[piece] - begin], hidden[0]))
    return windows


def test_poolings_are_the_slow_references_also_over_windows(
    tiny: Path, tiny_weights: Weights, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta(LENGTHS)
    windows = [slow_windows(tiny_weights, residues) for residues in source.read_text().split("\n")[1::2]]
    assert [len(each) for each in windows] == [2, 1, 2, 4, 1]
    expected = {
        "mean": [np.concatenate([vectors for vectors, _ in each]).mean(axis=0) for each in windows],
        "max": [np.concatenate([vectors for vectors, _ in each]).max(axis=0) for each in windows],
        "start": [np.mean([start for _, start in each], axis=0) for each in windows],
    }
    for pooling, rows in expected.items():
        info = embed(source, tmp_path / f"{pooling}.h5", encoder=tiny, pooling=pooling).encoder  # type: ignore[arg-type]
        assert (info.pooling, info.long) == (pooling, "window")
        with Embeddings.open(tmp_path / f"{pooling}.h5") as embeddings:
            np.testing.assert_allclose(embeddings.rows(embeddings.ids), rows, rtol=0, atol=3e-6)


def test_rows_per_residue_are_the_slow_references_and_read_by_plain_h5py(
    tiny: Path, tiny_weights: Weights, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta(LENGTHS)
    report = embed(source, tmp_path / "out.h5", encoder=tiny, pooling="residues", batch_residues=100)
    assert (report.encoder.pooling, report.windowed) == ("residues", 3)
    sequences = source.read_text().split("\n")[1::2]
    with h5py.File(tmp_path / "out.h5") as file:
        pointers = file["pointers"][:]
        assert pointers.tolist() == [0, 50, 60, 93, 193, 225]
        assert file["embeddings"].shape == (225, 32)
        for number, residues in enumerate(sequences):
            expected = np.concatenate([vectors for vectors, _ in slow_windows(tiny_weights, residues)])
            found = file["embeddings"][pointers[number] : pointers[number + 1]]
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
            assert file["digests"][number].tobytes() == sequence_digest(residues)
    embed(source, tmp_path / "cut.h5", encoder=tiny, pooling="residues", long="cut")
    with Embeddings.open(tmp_path / "cut.h5") as embeddings, Embeddings.open(tmp_path / "out.h5") as whole:
        assert [len(embeddings.residues(name)) for name in embeddings.ids] == [32, 10, 32, 32, 32]
        np.testing.assert_allclose(embeddings.residues("p1"), whole.residues("p1"), rtol=0, atol=3e-6)


def test_rows_per_residue_are_shared_reused_and_announced(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.fasta").write_text(f">a\nMKLV\n>b\n{'ACDEF' * 10}\n>c\nMKLV\n")
    (tmp_path / "b.fasta").write_text(f">x\nGHIKL\n>b\n{'ACDEF' * 10}\n>a\nMKLV\n")
    residues = functools.partial(embed, encoder=tiny, pooling="residues")
    with caplog.at_level(logging.INFO):
        residues(tmp_path / "a.fasta", tmp_path / "a.h5")
    announced = [message for message in caplog.messages if "one row per residue" in message]
    assert len(announced) == 1
    assert announced[0].startswith("one row per residue rows=58 file_gib=0.00 needed_gib=0.00 free_gib=")
    report = residues(tmp_path / "b.fasta", tmp_path / "b.h5", reuse=tmp_path / "a.h5")
    assert report.reused == 2
    residues(tmp_path / "b.fasta", tmp_path / "c.h5")
    with Embeddings.open(tmp_path / "a.h5") as a, Embeddings.open(tmp_path / "b.h5") as b:
        np.testing.assert_array_equal(a.residues("a"), a.residues("c"))
        np.testing.assert_array_equal(b.residues("a"), a.residues("a"))
        np.testing.assert_array_equal(b.residues("b"), a.residues("b"))
        with Embeddings.open(tmp_path / "c.h5") as c:
            np.testing.assert_array_equal(b.residues("x").shape, (5, 32))
            np.testing.assert_allclose(b.residues("x"), c.residues("x"), rtol=0, atol=1e-6)
    with pytest.raises(DataError, match="pooling is 'residues', not 'mean'"):
        embed(tmp_path / "a.fasta", tmp_path / "d.h5", encoder=tiny, reuse=tmp_path / "a.h5")


def test_rows_without_room_are_refused_before_anything_is_computed(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta([1000] * 20)
    monkeypatch.setattr(room, "free_bytes", lambda folder: 4 * 2**20)  # 20,000 rows of 128 bytes, twice, are 4.9 MiB
    with pytest.raises(MachineError, match=r"out\.h5: needs 5 MiB of disk for the file and .*, and 4 MiB are free"):
        embed(source, tmp_path / "out.h5", encoder=tiny, pooling="residues")
    assert not list(tmp_path.glob("out.h5.parts/*.f32"))
    assert embed(source, tmp_path / "out.h5", encoder=tiny).proteins == 20


def test_the_last_layer_is_the_default_and_others_differ(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([5, 40])
    rows = {}
    for layer in (None, 2, 1, 0):
        info = embed(source, tmp_path / f"{layer}.h5", encoder=tiny, layer=layer).encoder
        assert info.layer == (2 if layer is None else layer)
        with Embeddings.open(tmp_path / f"{layer}.h5") as embeddings:
            rows[layer] = embeddings.rows(embeddings.ids)
    assert (tmp_path / "None.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()
    assert np.abs(rows[1] - rows[2]).max() > 0.01
    assert np.abs(rows[0] - rows[1]).max() > 0.01


def test_one_giant_among_short_ones_is_no_event(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([20] * 50 + [35_000] + [30] * 50)
    embed(source, tmp_path / "out.h5", encoder=tiny)
    embed(source, tmp_path / "rows.h5", encoder=tiny, pooling="residues")
    with Embeddings.open(tmp_path / "out.h5") as embeddings, Embeddings.open(tmp_path / "rows.h5") as per_residue:
        giant = per_residue.residues("p50")
        assert giant.shape == (35_000, 32)
        mean = giant.mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(embeddings.rows(["p50"])[0], mean, rtol=0, atol=2e-5)
        np.testing.assert_allclose(
            embeddings.rows(["p0"])[0], per_residue.residues("p0").mean(axis=0), rtol=0, atol=2e-6
        )
