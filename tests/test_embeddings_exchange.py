"""Tests of the way to and from files with one dataset per protein, read as their tools read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest

from fedbio.cli import main
from fedbio.embeddings import Embeddings, sequence_digest, write_embeddings
from fedbio.embeddings_exchange import FORMS, Form, from_flat, to_flat
from fedbio.embeddings_merge import Proteins
from fedbio.errors import DataError, FormatError
from fedbio.files import sha256_file
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
PROTEINS = {"sp|P12345|A_HUMAN": "MK", "z/1": "ACD", "Q1": "V", "..": "GGGG", "a": "MKV"}


def store(path: Path, proteins: dict[str, str] = PROTEINS, info: EncoderInfo = INFO) -> Path:
    """Write an embeddings file whose rows count on."""
    rows = sum(map(len, proteins.values())) if info.pooling == "residues" else len(proteins)
    write_embeddings(
        path,
        info=info,
        ids=list(proteins),
        lengths=[len(sequence) for sequence in proteins.values()],
        digests=[sequence_digest(sequence) for sequence in proteins.values()],
        blocks=[np.arange(rows * 3, dtype=np.float32).reshape(-1, 3)],
        pointers=np.cumsum([0, *map(len, proteins.values())]) if info.pooling == "residues" else None,
    )
    return path


def given(proteins: dict[str, str]) -> Proteins:
    return lambda: iter(proteins.items())


@pytest.mark.parametrize("pooling", ["mean", "ends", "residues"])
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_gives_the_same_bytes(tmp_path: Path, form: Form, pooling: str) -> None:
    bins = "start 2, end 3" if pooling == "ends" else ""
    source = store(tmp_path / "a.h5", info=msgspec.structs.replace(INFO, pooling=pooling, bins=bins))
    assert to_flat(source, tmp_path / "flat.h5", form, proteins=given(PROTEINS)) == 5
    assert from_flat(tmp_path / "flat.h5", tmp_path / "back.h5") == 5
    assert sha256_file(tmp_path / "back.h5") == sha256_file(source)


def test_uniprots_form_is_read_as_its_manual_says(tmp_path: Path) -> None:
    to_flat(store(tmp_path / "a.h5"), tmp_path / "flat.h5")
    with h5py.File(tmp_path / "flat.h5", "r") as file:
        found = {accession: np.array(embedding).tolist() for accession, embedding in file.items()}
        slashed, dots = f"{sequence_digest('ACD').hex()}-1", f"{sequence_digest('GGGG').hex()}-3"
        assert found == {"P12345": [0, 1, 2], slashed: [3, 4, 5], "Q1": [6, 7, 8], dots: [9, 10, 11], "a": [12, 13, 14]}
        assert (file[slashed].attrs["original_id"], file[dots].attrs["original_id"]) == ("z/1", "..")


def test_residues_have_uniprots_form_too(tmp_path: Path) -> None:
    source = store(tmp_path / "a.h5", {"Q1": "MK"}, msgspec.structs.replace(INFO, pooling="residues"))
    to_flat(source, tmp_path / "flat.h5")
    with h5py.File(tmp_path / "flat.h5", "r") as file:
        assert file["Q1"][:].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bio_embeddings_form_has_numbers_and_original_ids(tmp_path: Path) -> None:
    to_flat(store(tmp_path / "a.h5"), tmp_path / "flat.h5", "bio_embeddings")
    with h5py.File(tmp_path / "flat.h5", "r") as file:
        by_id = {file[key].attrs["original_id"]: file[key][:].tolist() for key in file}
        assert set(file) == {"0", "1", "2", "3", "4"}
    assert by_id["z/1"] == [3, 4, 5]


def test_biotrainers_form_is_found_by_the_hash_of_the_sequence(tmp_path: Path) -> None:
    proteins = {"a": "MKV", "b": "AC", "c": "MKV"}
    assert (
        to_flat(store(tmp_path / "a.h5", proteins), tmp_path / "flat.h5", "biotrainer", proteins=given(proteins)) == 2
    )
    with h5py.File(tmp_path / "flat.h5", "r") as file:
        # sha256 of MKV_3 and AC_2
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in ("MKV_3", "AC_2")]
        assert set(file) == set(keys)
        assert [file[key].attrs["original_id"] for key in keys] == ["a", "b"]
        assert file[keys[0]][:].tolist() == [0, 1, 2]
    # with the sequences at hand, each protein is found again
    from_flat(tmp_path / "flat.h5", tmp_path / "back.h5", proteins=given(proteins))
    with Embeddings.open(tmp_path / "back.h5") as embeddings:
        assert embeddings.ids == ["a", "b", "c"]
        assert embeddings.rows(["c"]).tolist() == [[0, 1, 2]]


def test_biotrainers_form_needs_the_right_sequences(tmp_path: Path) -> None:
    source = store(tmp_path / "a.h5", {"a": "MKV"})
    with pytest.raises(DataError, match="biotrainer's keys need the sequences; give them with --proteins"):
        to_flat(source, tmp_path / "flat.h5", "biotrainer")
    with pytest.raises(DataError, match="id 'a' has no sequence in the file given with --proteins"):
        to_flat(source, tmp_path / "flat.h5", "biotrainer", proteins=given({"b": "MKV"}))
    with pytest.raises(DataError, match="id 'a' has another sequence in the file given with --proteins"):
        to_flat(source, tmp_path / "flat.h5", "biotrainer", proteins=given({"a": "MKA"}))
    assert not (tmp_path / "flat.h5").exists()


def test_two_ids_of_one_accession_are_refused(tmp_path: Path) -> None:
    source = store(tmp_path / "a.h5", {"sp|P1|A": "MK", "P1": "MK"})
    with pytest.raises(DataError, match=r"ids 'sp\|P1\|A' and 'P1' have the same key 'P1' in this form; rename one"):
        to_flat(source, tmp_path / "flat.h5")
    assert not (tmp_path / "flat.h5").exists()


def foreign(path: Path) -> Path:
    """Other tools' ways in one file: by accession, residues under a number with the id beside, by md5, in a group."""
    with h5py.File(path, "w") as file:
        file["P1"] = np.array([1, 2, 3], dtype=np.float16)
        file["7"] = np.array([[0, 0, 0], [2, 4, 6]], dtype=np.float32)
        file["7"].attrs["original_id"] = "P2"
        file[hashlib.md5(b"GGG").hexdigest()] = np.array([[4, 5, 6]], dtype=np.float64)
        file["tr/Q9"] = np.array([7, 8, 9], dtype=np.float32)
    return path


def test_another_tools_file_is_read_with_its_proteins_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "flat.h5")
    (tmp_path / "p.fasta").write_text(">P2 TARGET=Anywhere\nAC\n>tr/Q9\nMM\n>mine\nGGG\n>sp|P1|NAME\nMKV\n")
    call = ["embeddings", "convert", str(tmp_path / "flat.h5"), "-o", str(tmp_path / "a.h5")]
    call += ["--proteins", str(tmp_path / "p.fasta"), "--encoder-name", "prot_t5"]
    assert main(call) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.h5: 4 proteins\n"
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        assert embeddings.ids == ["P2", "tr/Q9", "mine", "sp|P1|NAME"]
        assert embeddings.rows(embeddings.ids).tolist() == [[1, 2, 3], [7, 8, 9], [4, 5, 6], [1, 2, 3]]
        assert embeddings.lengths.tolist() == [2, 2, 3, 3]
        assert embeddings.digests[0].tobytes() == sequence_digest("AC")
        assert (embeddings.info.name, embeddings.info.width, embeddings.info.weights_sha256) == (
            "prot_t5",
            3,
            "unknown",
        )


def test_what_another_tools_file_does_not_say_must_be_given(tmp_path: Path) -> None:
    source = foreign(tmp_path / "flat.h5")
    with pytest.raises(
        DataError, match=r"flat\.h5: the file does not say which encoder made it; name it with --encoder-name"
    ):
        from_flat(source, tmp_path / "a.h5")
    with pytest.raises(
        DataError, match=r"flat\.h5: the file does not hold the sequences' digests and lengths; give the"
    ):
        from_flat(source, tmp_path / "a.h5", info=INFO)
    with pytest.raises(
        DataError, match=r"1 of 2 proteins given with --proteins are not in it, first 'P3'; leave them out"
    ):
        from_flat(source, tmp_path / "a.h5", info=INFO, proteins=given({"P1": "MKV", "P3": "MKV"}))


def test_sequence_that_is_not_that_of_the_dataset_is_refused(tmp_path: Path) -> None:
    to_flat(store(tmp_path / "a.h5", {"Q1": "MK"}), tmp_path / "flat.h5")
    with pytest.raises(
        DataError, match="dataset 'Q1' is of another sequence than 'Q1' in the file given with --proteins"
    ):
        from_flat(tmp_path / "flat.h5", tmp_path / "b.h5", proteins=given({"Q1": "MV"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(4, np.float32), "dataset 'b': expected a vector of floating-point numbers of width 3, or one per"),
        (np.zeros((2, 4), np.float32), r"dataset 'b': expected .*, found float32 of shape \(2, 4\)"),
        (np.zeros(3, np.int64), r"dataset 'b': expected .*, found int64 of shape \(3,\)"),
        (np.zeros((1, 2, 3), np.float32), r"dataset 'b': expected .* of shape \(1, 2, 3\)"),
        (np.float32(1), r"dataset 'b': expected .* of shape \(\)"),
        (np.zeros((0, 3), np.float32), r"dataset 'b': expected .* of shape \(0, 3\)"),
        (np.zeros((5, 3), np.float32), "dataset 'b': has 5 rows, but the protein has 2 residues; is it of another"),
        (np.array([1, np.nan, 0], np.float32), "dataset 'b': holds numbers that are not finite"),
        (np.array([[1, 1, 1], [1, 1e39, 0]], np.float64), "dataset 'b': holds numbers that are not finite"),
    ],
    ids=["width", "width of residues", "whole numbers", "three axes", "no axis", "no rows", "rows", "NaN", "overflow"],
)
def test_odd_dataset_is_refused_by_file_and_key(tmp_path: Path, content: np.ndarray, message: str) -> None:
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["a"], file["b"] = np.zeros(3, np.float32), content
    with pytest.raises(FormatError, match=rf"flat\.h5: {message}"):
        from_flat(tmp_path / "flat.h5", tmp_path / "x.h5", info=INFO, proteins=given({"a": "M", "b": "MK"}))
    assert not (tmp_path / "x.h5").exists()


def test_values_in_other_files_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(np.zeros(3, np.float32).tobytes())
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file.create_dataset("a", (3,), np.float32, external=[(str(tmp_path / "secret"), 0, 12)])
        file["linked"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")
    with pytest.raises(FormatError, match=r"flat\.h5: dataset 'a': its values are in another file; copy them into"):
        from_flat(tmp_path / "flat.h5", tmp_path / "x.h5", info=INFO, proteins=given({"a": "M"}))


def test_dataset_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file.create_dataset("a", (2**40, 3), np.float32, chunks=(256, 3))
    with pytest.raises(FormatError, match=r"dataset 'a': expected .* of shape \(1099511627776, 3\)"):
        from_flat(tmp_path / "flat.h5", tmp_path / "x.h5", info=INFO, proteins=given({"a": "M"}))


def test_two_datasets_of_one_id_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        for key in ("0", "1"):
            file[key] = np.zeros(3, np.float32)
            file[key].attrs["original_id"] = "a"
    with pytest.raises(FormatError, match=r"flat\.h5: datasets '0' and '1' are both of id 'a'; delete one of them"):
        from_flat(tmp_path / "flat.h5", tmp_path / "x.h5", info=INFO, proteins=given({"a": "M"}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sha256", "ab", "attribute sha256 is 'ab', not 64 hexadecimal digits"),
        ("sha256", 7, "attribute sha256 is 7, not 64 hexadecimal digits"),
        ("length", 0, "attribute length is 0, not a whole number"),
        ("length", "long", "attribute length is 'long', not a whole number"),
        ("place", 1.5, "attribute place is 1.5, not a whole number"),
    ],
)
def test_odd_attribute_is_refused_by_file_and_key(tmp_path: Path, name: str, value: object, message: str) -> None:
    to_flat(store(tmp_path / "a.h5", {"Q1": "MK"}), tmp_path / "flat.h5")
    with h5py.File(tmp_path / "flat.h5", "r+") as file:
        file["Q1"].attrs[name] = value
    with pytest.raises(FormatError, match=rf"flat\.h5: dataset 'Q1': {message}"):
        from_flat(tmp_path / "flat.h5", tmp_path / "x.h5")


def test_no_hdf5_and_no_dataset_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.h5").write_text("no")
    h5py.File(tmp_path / "empty.h5", "w").close()
    for name, message in [
        ("x.h5", "not a readable HDF5 file"),
        ("missing.h5", "no such file"),
        ("empty.h5", "no embedding in the file; was it written or copied completely?"),
    ]:
        assert main(["embeddings", "convert", str(tmp_path / name), "-o", str(tmp_path / "a.h5")]) == 2
        assert f"{name}: {message}" in capsys.readouterr().err


def test_command_chooses_the_form_by_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, flat = store(tmp_path / "a.h5", {"Q1": "MK"}), tmp_path / "flat.h5"
    assert main(["embeddings", "convert", str(source), "-o", str(flat), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"proteins": 1, "output": str(flat)}
    with h5py.File(flat, "r") as file:
        assert set(file) == {"Q1"}
    assert main(["embeddings", "convert", str(flat), "-o", str(tmp_path / "b.h5")]) == 0
    assert sha256_file(tmp_path / "b.h5") == sha256_file(source)
    assert main(["embeddings", "convert", str(flat), "-o", str(tmp_path / "b.npy")]) == 2
    assert "flat.h5: has one dataset per protein; convert it to our form first (--to fedbio)" in capsys.readouterr().err
    assert main(["embeddings", "convert", str(source), "-o", str(tmp_path / "c.h5"), "--to", "fedbio"]) == 2
    assert "a.h5: is in our form already; choose another one with --to" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["symbolic", "hard", "same"])
def test_command_does_not_replace_its_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str) -> None:
    source = store(tmp_path / "a.h5", {"Q1": "MK"})
    before = sha256_file(source)
    output = source if link == "same" else tmp_path / "b.h5"
    if link == "symbolic":
        output.symlink_to(source)
    elif link == "hard":
        output.hardlink_to(source)
    for call in (["convert", str(source)], ["merge", str(source)]):
        assert main(["embeddings", *call, "-o", str(output)]) == 2
        assert f"-o {output}: this is {source}, which is read; name another file" in capsys.readouterr().err
    assert sha256_file(source) == before


@pytest.mark.parametrize(
    ("name", "what"), [("m.csv", "the ending '.csv' stands for no known form"), ("m", "no ending")]
)
def test_command_refuses_an_ending_that_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, what: str
) -> None:
    source, output = store(tmp_path / "a.h5", {"Q1": "MK"}), tmp_path / name
    assert main(["embeddings", "convert", str(source), "-o", str(output)]) == 2
    message = capsys.readouterr().err
    assert what in message
    assert "end it in .h5, .hdf5, .npy, .parquet, or say the form with --to" in message
    assert not output.exists()
    assert main(["embeddings", "convert", str(source), "-o", str(output), "--to", "bio_embeddings"]) == 0
