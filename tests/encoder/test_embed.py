"""Tests of `embed_file` from the proteins' file to the embeddings file, whatever comes between."""

from __future__ import annotations

import functools
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.embeddings import Embeddings, Parts
from fedbio.encoder import embed_file, work
from fedbio.encoder.alphabet import ALPHABETS
from fedbio.errors import DataError, MachineError, RefusedError
from fedbio.files import exclusive_lock
from fedbio.weights import Weights, weights_digest, write_weights

from .conftest import TINY, WriteFasta, slow_encoder

# so little work is slowed down, not sped up, by a second thread on a busy machine; the references are in float32,
# and a processor that has bfloat16 would take that by itself
embed = functools.partial(embed_file, threads=1, dtype="float32")


@pytest.fixture
def tiny(tmp_path: Path, tiny_weights: Weights) -> Path:
    write_weights(tmp_path / "tiny", TINY, tiny_weights)
    return tmp_path / "tiny"


def expected_row(weights: Weights, *spans: tuple[str, int, int]) -> np.ndarray:
    """Mean over the residues from `first` to `last` of each window, by the slow reference."""
    rows = []
    for residues, first, last in spans:
        tokens = np.array([1, *ALPHABETS["esm1nv"].encode(residues), 2])
        rows.append(slow_encoder(TINY, weights, tokens)[1 + first : 1 + last])
    return np.concatenate(rows).mean(axis=0)


def test_rows_are_the_slow_references_in_the_order_of_the_input(
    tiny: Path, tiny_weights: Weights, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta([5, 32, 1, 20])
    report = embed(source, tmp_path / "out.h5", encoder=tiny)
    assert (report.proteins, report.residues, report.cut, report.windowed, report.reused, report.resumed) == (
        4, 58, 0, 0, 0, 0,
    )  # fmt: skip
    sequences = source.read_text().split("\n")[1::2]
    with Embeddings.open(tmp_path / "out.h5") as embeddings:
        assert embeddings.ids == ["p0", "p1", "p2", "p3"]
        assert embeddings.lengths.tolist() == [5, 32, 1, 20]
        assert embeddings.info == report.encoder
        expected = [expected_row(tiny_weights, (residues, 0, len(residues))) for residues in sequences]
        np.testing.assert_allclose(embeddings.rows(embeddings.ids), expected, rtol=0, atol=2e-6)
    assert report.encoder.weights_sha256 == weights_digest(tiny_weights)
    assert (report.encoder.name, report.encoder.dtype, report.encoder.layer) == ("tiny", "float32", 2)
    assert not (tmp_path / "out.h5.parts").exists()


def test_longer_proteins_are_cut_counted_and_logged_once(
    tiny: Path, tiny_weights: Weights, write_fasta: WriteFasta, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_fasta([33, 32, 50])
    with caplog.at_level(logging.WARNING):
        report = embed(source, tmp_path / "out.h5", encoder=tiny, long="cut")
    assert (report.cut, report.windowed) == (2, 0)
    assert caplog.messages == ["long proteins cut to 32 residues proteins=2 of=3"]
    residues = source.read_text().split("\n")[5]
    with Embeddings.open(tmp_path / "out.h5") as embeddings:
        assert (embeddings.lengths > embeddings.info.max_residues).tolist() == [True, False, True]
        row = embeddings.rows(["p2"])[0]
    np.testing.assert_allclose(row, expected_row(tiny_weights, (residues[:32], 0, 32)), rtol=0, atol=2e-6)


def test_windows_average_every_residue_once(
    tiny: Path, tiny_weights: Weights, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta([50, 10])
    report = embed(source, tmp_path / "out.h5", encoder=tiny, long="window")
    assert (report.cut, report.windowed) == (0, 1)
    residues = source.read_text().split("\n")[1]
    with Embeddings.open(tmp_path / "out.h5") as embeddings:
        row = embeddings.rows(["p0"])[0]
    # windows 0-32 and 18-50; they meet in the middle of what they share, at residue 25
    expected = expected_row(tiny_weights, (residues[:32], 0, 25), (residues[18:], 7, 32))
    np.testing.assert_allclose(row, expected, rtol=0, atol=2e-6)


def test_equal_sequences_are_computed_once_and_j_is_x(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKJV\n>b\nMKXV\n>c\nMKJV\n")
    report = embed(tmp_path / "a.fasta", tmp_path / "out.h5", encoder=tiny)
    assert report.proteins == 3
    with Embeddings.open(tmp_path / "out.h5") as embeddings:
        a, b, c = embeddings.rows(["a", "b", "c"])
    np.testing.assert_array_equal(a, c)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_a_finished_file_is_left_alone(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([5, 6])
    embed(source, tmp_path / "out.h5", encoder=tiny)
    before = (tmp_path / "out.h5").stat()
    (tmp_path / "out.h5.parts").mkdir()  # as if killed just before the end
    report = embed(source, tmp_path / "out.h5", encoder=tiny)
    assert (tmp_path / "out.h5").stat().st_mtime_ns == before.st_mtime_ns
    assert report.reused == 2
    assert not (tmp_path / "out.h5.parts").exists()


def test_the_same_call_gives_the_same_bytes(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([5, 40, 6] * 100)
    for name in ("a.h5", "b.h5"):
        embed(source, tmp_path / name, encoder=tiny)
        time.sleep(1.01)  # a time stamp in the file would differ
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_an_output_of_another_encoder_is_refused(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([5, 6])
    embed(source, tmp_path / "out.h5", encoder=tiny)
    expected = (
        r"out\.h5: made with another encoder: pooling is 'mean', not 'max', long is 'window', not 'cut'; give another "
        r"output, or delete this one \(`--pooling mean --long window` does as before\)"
    )
    with pytest.raises(DataError, match=expected):
        embed(source, tmp_path / "out.h5", encoder=tiny, long="cut", pooling="max")
    with pytest.raises(DataError, match=r"layer is 2, not 1; .* \(`--layer 2` does as before\)"):
        embed(source, tmp_path / "out.h5", encoder=tiny, layer=1)
    with pytest.raises(DataError, match=r"weights_sha256 is '[0-9a-f]{64}', not '[0-9a-f]{64}'.*; give another output"):
        embed(source, tmp_path / "out.h5", encoder="esm1nv-44m")


def test_an_output_of_other_proteins_is_refused(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    embed(write_fasta([5, 6]), tmp_path / "out.h5", encoder=tiny)
    expected = (
        r"out\.h5: holds the embeddings of other proteins: of its 2 sequences 0 are here; give another output, or "
        r"bring it up to date nevertheless with `--reuse .*out\.h5`"
    )
    with pytest.raises(DataError, match=expected):
        embed(write_fasta([5, 6], "b.fasta", seed=1), tmp_path / "out.h5", encoder=tiny)


def test_unexpected_weights_are_refused_with_both_digests(
    tiny: Path, tiny_weights: Weights, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta([5])
    embed(source, tmp_path / "right.h5", encoder=tiny, expected_sha256=weights_digest(tiny_weights))
    with pytest.raises(RefusedError, match=f"SHA-256 {weights_digest(tiny_weights)}, but {'0' * 64} is expected"):
        embed(source, tmp_path / "wrong.h5", encoder=tiny, expected_sha256="0" * 64)
    assert not list(tmp_path.glob("wrong*"))


def test_an_untrained_encoder_is_said_to_be_one(
    write_fasta: WriteFasta, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report = embed(write_fasta([3]), tmp_path / "out.h5", encoder="esm1nv-44m")
    assert not report.encoder.trained
    assert caplog.messages == ["untrained encoder name=esm1nv-44m sha256=7d5c47c85cb2"]


def test_a_second_process_on_one_output_is_refused(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([5])
    with (
        exclusive_lock(tmp_path / ".out.h5.lock", "out.h5"),
        pytest.raises(MachineError, match=rf"out\.h5 is in use by process {os.getpid()} "),
    ):
        embed(source, tmp_path / "out.h5", encoder=tiny)


def test_rows_are_reused_by_sequence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n>b\nACDEF\n")
    (tmp_path / "b.fasta").write_text(">x\nGHIKL\n>y\nACDEF\n>z\nGHIKL\n>w\nMKLV\n")
    embed(tmp_path / "a.fasta", tmp_path / "a.h5", encoder=tiny)
    report = embed(tmp_path / "b.fasta", tmp_path / "b.h5", encoder=tiny, reuse=tmp_path / "a.h5")
    assert report.reused == 2
    with Embeddings.open(tmp_path / "a.h5") as a, Embeddings.open(tmp_path / "b.h5") as b:
        np.testing.assert_array_equal(b.rows(["w", "y"]), a.rows(["a", "b"]))
        np.testing.assert_array_equal(b.rows(["x"]), b.rows(["z"]))
    report = embed(tmp_path / "b.fasta", tmp_path / "a.h5", encoder=tiny, reuse=tmp_path / "a.h5")
    assert report.reused == 2
    report = embed(tmp_path / "a.fasta", tmp_path / "c.h5", encoder=tiny, reuse=tmp_path / "a.h5")
    assert report.reused == 2


def test_rows_of_another_encoder_are_not_reused(tiny: Path, write_fasta: WriteFasta, tmp_path: Path) -> None:
    source = write_fasta([5])
    embed(source, tmp_path / "a.h5", encoder=tiny, dtype="bfloat16")
    with pytest.raises(DataError, match=r"a\.h5: made with another encoder: dtype is 'bfloat16', not 'float32'"):
        embed(source, tmp_path / "b.h5", encoder=tiny, dtype="float32", reuse=tmp_path / "a.h5")


def test_a_damaged_shard_is_computed_again(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta([20] * 30)
    embed(source, tmp_path / "whole.h5", encoder=tiny, batch_residues=100)
    broken_off(source, tmp_path / "out.h5", tiny, after=5, monkeypatch=monkeypatch)
    shards = sorted((tmp_path / "out.h5.parts").glob("*.f32"))
    assert len(shards) == 5
    content = bytearray(shards[3].read_bytes())
    content[7] ^= 1
    shards[3].write_bytes(content)
    report = embed(source, tmp_path / "out.h5", encoder=tiny, batch_residues=100)
    assert report.resumed == 4 * 4  # shards of one pack, packs of four proteins
    assert (tmp_path / "out.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_unfinished_work_of_another_encoder_is_refused(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta([20] * 30)
    broken_off(source, tmp_path / "out.h5", tiny, after=5, monkeypatch=monkeypatch)
    with pytest.raises(DataError, match=r"manifest\.json: made with another encoder: long is 'window', not 'cut'"):
        embed(source, tmp_path / "out.h5", encoder=tiny, long="cut")


@pytest.mark.parametrize("pooling", ["mean", "residues"])
def test_unfinished_work_on_other_proteins_is_kept(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: Any
) -> None:
    # the last ones are cut into windows; two runs are broken off, each on more proteins than the one before
    lengths, output = [20 + number for number in range(30)], tmp_path / "out.h5"
    for number in (30, 40):
        lengths += [20 + number] * (number - len(lengths))
        broken_off(write_fasta(lengths), output, tiny, after=4, monkeypatch=monkeypatch, pooling=pooling)
    source = write_fasta([*lengths, 25])
    with monkeypatch.context() as patch:  # as if killed when the rows are in their file, and the parts there, too
        patch.setattr("fedbio.encoder.unfinished.shutil.rmtree", interrupt)
        with pytest.raises(InterruptedError):
            embed(source, output, encoder=tiny, batch_residues=100, pooling=pooling)
    report = embed(source, output, encoder=tiny, batch_residues=100, pooling=pooling)
    assert report.proteins == 41
    assert report.resumed == 0
    assert report.reused >= 8
    embed(source, tmp_path / "fresh.h5", encoder=tiny, batch_residues=100, pooling=pooling)
    with Embeddings.open(output) as found, Embeddings.open(tmp_path / "fresh.h5") as wanted:
        assert found.ids == wanted.ids
        assert len(found) == 41
        rows = [np.concatenate(list(each.blocks())) for each in (found, wanted)]
        np.testing.assert_allclose(*rows, rtol=0, atol=2e-6)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "out.h5", "fresh.h5", "proteins.fasta", "tiny",
    }  # fmt: skip


def interrupt(*_: Any, **__: Any) -> None:
    raise InterruptedError


def test_unfinished_work_is_kept_with_other_packs(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta([20 + number % 7 for number in range(30)])
    broken_off(source, tmp_path / "out.h5", tiny, after=4, monkeypatch=monkeypatch)
    broken_off(source, tmp_path / "out.h5", tiny, after=2, monkeypatch=monkeypatch, batch_residues=60)
    report = embed(source, tmp_path / "out.h5", encoder=tiny, batch_residues=200)
    assert report.reused > 12


@pytest.mark.parametrize("damaged", ["digests", "lengths", "budget"])
def test_unfinished_work_that_does_not_say_on_what_is_thrown_away(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    broken_off(write_fasta([20, 21, 22] * 10), tmp_path / "out.h5", tiny, after=4, monkeypatch=monkeypatch)
    record = tmp_path / "out.h5.parts" / damaged
    record.write_bytes(record.read_bytes()[4:] + b"\x14\0\0\0")
    report = embed(write_fasta([20] * 31), tmp_path / "out.h5", encoder=tiny, batch_residues=100)
    assert (report.proteins, report.reused, report.resumed) == (31, 0, 0)


@pytest.fixture
def kept(tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows kept of unfinished work on thirty proteins, beside unfinished work on forty."""
    for number in (30, 40):
        broken_off(write_fasta([20] * number), tmp_path / "out.h5", tiny, after=2, monkeypatch=monkeypatch)
    assert (tmp_path / "out.h5.kept.h5").is_file()
    return tmp_path / "out.h5.kept.h5"


def test_rows_kept_of_another_encoder_are_refused_with_what_to_do(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, kept: Path
) -> None:
    with pytest.raises(
        DataError, match=r"pooling is 'mean', not 'max'; give the settings as before, or delete"
    ) as info:
        embed(write_fasta([20] * 40), tmp_path / "out.h5", encoder=tiny, pooling="max")
    assert f"delete {kept} and {tmp_path / 'out.h5.parts'}" in str(info.value)


def test_damaged_rows_that_were_kept_are_computed_again(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, kept: Path
) -> None:
    kept.write_bytes(kept.read_bytes()[:1000])
    (tmp_path / f".{kept.name}.1.1.part").touch()  # a kill while they were written
    # those of the second run are there still
    assert embed(write_fasta([20] * 40), tmp_path / "out.h5", encoder=tiny, batch_residues=100).reused == 8
    assert sorted(path.name for path in tmp_path.iterdir() if "lock" not in path.name) == [
        "out.h5", "proteins.fasta", "tiny",
    ]  # fmt: skip


def test_what_a_finished_output_does_not_hold_stays(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    embed(write_fasta([20] * 30), output, encoder=tiny)
    for number in (40, 50):
        broken_off(write_fasta([20] * number), output, tiny, after=2, monkeypatch=monkeypatch)
    embed(write_fasta([20] * 30), output, encoder=tiny)
    assert (tmp_path / "out.h5.kept.h5").is_file()
    report = embed(write_fasta([20] * 50), output, encoder=tiny, batch_residues=100)
    assert report.reused > 30
    assert report.resumed > 0
    assert not (tmp_path / "out.h5.kept.h5").exists()


@pytest.mark.parametrize("damaged", ["out.h5.kept.h5", "out.h5.parts/manifest.json", "out.h5.parts/digests"])
def test_a_finished_output_does_not_mind_what_is_damaged_beside_it(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    output = tmp_path / "out.h5"
    embed(write_fasta([20] * 30), output, encoder=tiny)
    broken_off(write_fasta([20] * 40), output, tiny, after=2, monkeypatch=monkeypatch)
    (tmp_path / damaged).write_bytes(b"damaged")
    assert embed(write_fasta([20] * 30), output, encoder=tiny).reused == 30
    assert not (tmp_path / damaged).exists()


def test_parts_that_cannot_be_deleted_are_told(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, parts = tmp_path / "out.h5", tmp_path / "out.h5.parts"
    broken_off(write_fasta([20] * 30), output, tiny, after=2, monkeypatch=monkeypatch)
    parts.rename(tmp_path / "elsewhere")
    parts.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match=r"out\.h5\.parts: cannot be deleted"):
        embed(write_fasta([20] * 31), output, encoder=tiny, batch_residues=100)


def broken_off(
    source: Path, output: Path, encoder: Path, *, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Let a run end in an error once it has written so many shards."""
    append = Parts.append

    def append_until(parts: Parts, start: int, vectors: np.ndarray) -> None:
        append(parts, start, vectors)
        parts.flush()
        if len(parts._paths) == after:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "append", append_until)
        with pytest.raises(InterruptedError):
            embed(source, output, encoder=encoder, **{"batch_residues": 100, **options})


def test_an_output_is_brought_up_to_date_when_most_of_it_stays(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKLV\n>b\nACDEF\n>c\nGHIKL\n")
    embed(tmp_path / "a.fasta", tmp_path / "out.h5", encoder=tiny)
    with Embeddings.open(tmp_path / "out.h5") as before:
        rows = before.rows(["a", "c"])
    (tmp_path / "a.fasta").write_text(">c\nGHIKL\n>d\nWWY\n>a\nMKLV\n>e\nMKLV\n")
    with caplog.at_level(logging.INFO):
        report = embed(tmp_path / "a.fasta", tmp_path / "out.h5", encoder=tiny)
    assert caplog.messages == [f"output brought up to date file={tmp_path / 'out.h5'} kept=2 new=1 left_out=1"]
    assert (report.proteins, report.reused) == (4, 3)
    with Embeddings.open(tmp_path / "out.h5") as after:
        assert after.ids == ["c", "d", "a", "e"]
        np.testing.assert_array_equal(after.rows(["a", "c"]), rows)
        np.testing.assert_array_equal(after.rows(["e"]), rows[:1])
    # one of three is too little to be the same file by another name; asked for, it is done
    (tmp_path / "b.fasta").write_text(">d\nWWY\n>f\nKKK\n")
    with pytest.raises(DataError, match=r"of its 3 sequences 1 are here; .* with `--reuse .*out\.h5`"):
        embed(tmp_path / "b.fasta", tmp_path / "out.h5", encoder=tiny)
    report = embed(tmp_path / "b.fasta", tmp_path / "out.h5", encoder=tiny, reuse=tmp_path / "out.h5")
    assert (report.proteins, report.reused) == (2, 1)


def test_blocks_are_planned_apart_and_equal_sequences_in_several_are_computed_once(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta([5 + number % 70 for number in range(100)])
    source.write_text(source.read_text() + source.read_text().replace(">p", ">q"))
    embed(source, tmp_path / "one.h5", encoder=tiny, batch_residues=100)
    monkeypatch.setattr(work, "BLOCK_PROTEINS", 7)
    broken_off(source, tmp_path / "out.h5", tiny, after=20, monkeypatch=monkeypatch)
    report = embed(source, tmp_path / "out.h5", encoder=tiny, batch_residues=100)
    assert report.resumed > 0
    embed(source, tmp_path / "whole.h5", encoder=tiny, batch_residues=100)
    assert (tmp_path / "out.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    with Embeddings.open(tmp_path / "one.h5") as one, Embeddings.open(tmp_path / "out.h5") as out:
        assert (len(out), out.ids) == (200, one.ids)
        np.testing.assert_allclose(out.rows(out.ids), one.rows(one.ids), rtol=0, atol=2e-6)
        np.testing.assert_array_equal(out.rows(["p3", "p99"]), out.rows(["q3", "q99"]))
