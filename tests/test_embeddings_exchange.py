"""Tests of merging, and of the way to and from files with one dataset per protein."""

from __future__ import annotations

from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest

from fedbio.cli import main
from fedbio.embeddings import Embeddings, sequence_digest, write_embeddings
from fedbio.embeddings_exchange import from_flat, is_flat, merge, to_flat
from fedbio.errors import DataError, FormatError
from fedbio.results import EncoderInfo

INFO = EncoderInfo(
    name="tiny",
    weights_sha256="ab" * 32,
    trained=True,
    width=3,
    pooling="mean",
    layer=2,
    dtype="float32",
    max_residues=510,
    long="cut",
)


def store(path: Path, proteins: dict[str, str], info: EncoderInfo = INFO, first: float = 0.0) -> Path:
    vectors = first + np.arange(len(proteins) * 3, dtype=np.float32).reshape(-1, 3)
    write_embeddings(
        path,
        info=info,
        ids=list(proteins),
        lengths=[len(sequence) for sequence in proteins.values()],
        digests=[sequence_digest(sequence) for sequence in proteins.values()],
        blocks=[vectors],
    )
    return path


def test_merge_keeps_order_and_takes_the_first_of_equal_proteins(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "AC"})
    two = store(tmp_path / "2.h5", {"c": "GG", "a": "MK", "d": "V"}, first=100)
    assert merge([one, two], tmp_path / "all.h5") == 4
    with Embeddings.open(tmp_path / "all.h5") as embeddings:
        assert embeddings.ids == ["a", "b", "c", "d"]
        assert embeddings.lengths.tolist() == [2, 2, 2, 1]
        assert embeddings.rows(["a", "c", "d"])[:, 0].tolist() == [0.0, 100.0, 106.0]
        assert embeddings.digests[3].tobytes() == sequence_digest("V")


def test_merge_refuses_one_id_for_two_sequences(tmp_path: Path) -> None:
    one, two = store(tmp_path / "1.h5", {"a": "MK"}), store(tmp_path / "2.h5", {"a": "MV"})
    with pytest.raises(DataError, match=r"2\.h5: id 'a' has another sequence there than in .*1\.h5; rename one"):
        merge([one, two], tmp_path / "all.h5")


def test_merge_refuses_two_encoders(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK"})
    two = store(tmp_path / "2.h5", {"b": "MV"}, msgspec.structs.replace(INFO, layer=1))
    with pytest.raises(DataError, match=r"2\.h5: made with another encoder: layer is 1, not 2; merge files of one"):
        merge([one, two], tmp_path / "all.h5")


def test_there_and_back_keeps_everything(tmp_path: Path) -> None:
    proteins = {"b": "MK", "a/1": "AC", "..": "GG", "sp|P1|X": "MK"}
    source = store(tmp_path / "a.h5", proteins)
    assert to_flat(source, tmp_path / "flat.h5") == 4
    assert (is_flat(source), is_flat(tmp_path / "flat.h5")) == (False, True)
    assert from_flat(tmp_path / "flat.h5", tmp_path / "back.h5") == 4
    with Embeddings.open(source) as before, Embeddings.open(tmp_path / "back.h5") as after:
        assert sorted(after.ids) == sorted(before.ids)
        assert after.info == before.info
        np.testing.assert_array_equal(after.rows(before.ids), before.rows(before.ids))
        assert dict(zip(after.ids, after.lengths.tolist(), strict=True)) == {"b": 2, "a/1": 2, "..": 2, "sp|P1|X": 2}


def test_flat_files_have_uniprots_form(tmp_path: Path) -> None:
    to_flat(store(tmp_path / "a.h5", {"P12345": "MK", "Q1": "V"}), tmp_path / "flat.h5")
    with h5py.File(tmp_path / "flat.h5", "r") as file:
        assert {name: item[:].tolist() for name, item in file.items()} == {"P12345": [0, 1, 2], "Q1": [3, 4, 5]}


def foreign(path: Path) -> Path:
    """Another tool's file: a vector by id, and residues under a number with the id beside."""
    with h5py.File(path, "w") as file:
        file["P1"] = np.array([1, 2, 3], dtype=np.float16)
        file["7"] = np.array([[0, 0, 0], [2, 4, 6]], dtype=np.float32)
        file["7"].attrs["original_id"] = "P2"
    return path


def test_another_tools_file_is_read_with_its_proteins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "flat.h5")
    (tmp_path / "p.fasta").write_text(">P1\nMKV\n>P2\nAC\n")
    arguments = ["embeddings", "convert", str(tmp_path / "flat.h5"), "-o", str(tmp_path / "a.h5")]
    arguments += ["--proteins", str(tmp_path / "p.fasta"), "--encoder-name", "prot_t5"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.h5: 2 proteins\n"
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        assert (embeddings.info.name, embeddings.info.width) == ("prot_t5", 3)
        assert embeddings.rows(["P1", "P2"]).tolist() == [[1, 2, 3], [1, 2, 3]]
        assert dict(zip(embeddings.ids, embeddings.lengths.tolist(), strict=True)) == {"P1": 3, "P2": 2}


def test_what_another_tools_file_does_not_say_must_be_given(tmp_path: Path) -> None:
    source = foreign(tmp_path / "flat.h5")
    with pytest.raises(DataError, match="does not say which encoder made it; name it with --encoder-name"):
        from_flat(source, tmp_path / "a.h5")
    with pytest.raises(DataError, match="give the proteins with --proteins"):
        from_flat(source, tmp_path / "a.h5", info=INFO)
    with pytest.raises(DataError, match="protein 'P2' is not in the file given with --proteins"):
        from_flat(source, tmp_path / "a.h5", info=INFO, sequences={"P1": "MKV"})


def test_datasets_of_another_width_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["a"], file["b"] = np.zeros(3, np.float32), np.zeros(4, np.float32)
    with pytest.raises(FormatError, match=r"dataset '/b': expected a vector of width 3, or one per residue, found"):
        from_flat(tmp_path / "flat.h5", tmp_path / "a.h5", info=INFO, sequences={"a": "M", "b": "M"})


def test_no_hdf5_at_all_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(FormatError, match=r"x\.h5: not a readable HDF5 file"):
        is_flat(tmp_path / "x.h5")
    with pytest.raises(DataError, match=r"y\.h5: no such file"):
        is_flat(tmp_path / "y.h5")
