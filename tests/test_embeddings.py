"""Tests of the embeddings file: its layout, its bytes, and what is said of files that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest

from fedbio.embeddings import Embeddings, sequence_digest, write_embeddings
from fedbio.errors import DataError, FormatError
from fedbio.results import EncoderInfo

INFO = EncoderInfo(
    name="tiny",
    weights_sha256="ab" * 32,
    trained=True,
    width=4,
    pooling="mean",
    layer=2,
    dtype="float32",
    max_residues=510,
    long="cut",
)
N = 600
IDS = [f"p/{number} ü" for number in range(N)]
VECTORS = np.arange(N * 4, dtype=np.float32).reshape(N, 4)


def write(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "info": INFO,
        "ids": IDS,
        "lengths": range(1, N + 1),
        "digests": [sequence_digest(name) for name in IDS],
        "blocks": np.array_split(VECTORS, 7),
    }
    write_embeddings(path, **(content | changes))
    return path


def test_layout_on_disk_is_the_published_one(tmp_path: Path) -> None:
    with h5py.File(write(tmp_path / "a.h5"), "r") as file:
        assert {name: (item.shape, item.chunks) for name, item in file.items()} == {
            "embeddings": ((N, 4), (256, 4)),
            "ids": ((N,), None),
            "lengths": ((N,), None),
            "digests": ((N, 32), None),
        }
        assert file["embeddings"].dtype == np.float32
        assert file["ids"][3].decode() == "p/3 ü"
        assert file["digests"][3].tobytes() == sequence_digest("p/3 ü")
        attributes = dict(file.attrs)
    assert attributes.pop("fedbio_version")
    assert attributes == {"format": "fedbio-embeddings", "version": 1, **msgspec.to_builtins(INFO)}


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    with Embeddings.open(write(tmp_path / "a.h5")) as embeddings:
        assert (len(embeddings), embeddings.ids, embeddings.info) == (N, IDS, INFO)
        places = [599, 0, 256, 255, 0, 400]
        np.testing.assert_array_equal(embeddings.rows([IDS[place] for place in places]), VECTORS[places])
        assert embeddings.rows([]).shape == (0, 4)
        np.testing.assert_array_equal(np.concatenate(list(embeddings.blocks())), VECTORS)


def test_float16_files_are_read_as_float32(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["embeddings"]
        file["embeddings"] = VECTORS.astype(np.float16)
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        row = embeddings.rows([IDS[1]])
    assert row.dtype == np.float32
    assert row.tolist() == [[4.0, 5.0, 6.0, 7.0]]


def test_missing_proteins_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    with (
        Embeddings.open(write(tmp_path / "a.h5")) as embeddings,
        pytest.raises(DataError, match="2 of 3 proteins have no embedding, first 'x'; embed the file"),
    ):
        embeddings.rows([IDS[0], "x", "y"])


def test_no_proteins_make_a_file_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ids=[], lengths=[], digests=[], blocks=[])
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        assert len(embeddings) == 0


def test_a_file_that_cannot_be_finished_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="600 rows for 599 ids"):
        write(tmp_path / "a.h5", ids=IDS[1:], digests=[bytes(32)] * 599)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, r"an HDF5 file, but not of format fedbio-embeddings; `fedbio embeddings convert`"),
        ({"version": 2}, r"fedbio-embeddings version 2; this release reads version 1, update fedbio"),
        ({"width": "x"}, r"attributes of the root: Expected `int`, got `str` - at `\$\.width`"),
        ({"long": None}, r"attributes of the root: Object missing required field `long`"),
        ({"width": 5}, r"600 ids of width 5 do not fit the shapes"),
    ],
)
def test_wrong_attributes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        for name, value in change.items():
            del file.attrs[name]
            if value is not None:
                file.attrs[name] = value
    with pytest.raises(FormatError, match=rf"a\.h5: {message}"):
        Embeddings.open(tmp_path / "a.h5")


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["lengths"]
    with pytest.raises(FormatError, match=r"a\.h5: dataset /lengths is missing; embed the proteins again"):
        Embeddings.open(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("ids", lambda file, there: file.create_group("ids")),
        ("ids", lambda file, there: file.create_dataset("ids", data="one")),
        ("lengths", lambda file, there: file.create_dataset("lengths", data=there.astype("S4"))),
        ("lengths", lambda file, there: file.create_dataset("lengths", (10**12,), np.int64)),
        ("lengths", lambda file, there: file.create_dataset("lengths", (10**12,), np.int64, compression="gzip")),
        ("lengths", lambda file, there: file.__setitem__("lengths", h5py.ExternalLink("other.h5", "/lengths"))),
        ("digests", lambda file, there: file.create_dataset("digests", there.shape, "u1", external=[("x", 0, 19200)])),
        ("embeddings", lambda file, there: file.create_dataset("embeddings", there.shape, "f4", chunks=(1, 4))),
    ],
)
def test_datasets_that_are_not_what_they_say_are_refused(tmp_path: Path, name: str, made: Any) -> None:
    write(tmp_path / "other.h5")
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        there = file[name][:]
        del file[name]
        made(file, there)
    with pytest.raises(
        FormatError, match=rf"a\.h5: (/{name} is not a dataset|dataset /{name} holds less than it says)"
    ):
        Embeddings.open(tmp_path / "a.h5")


def test_a_compressed_matrix_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        there = file["embeddings"][:]
        del file["embeddings"]
        file.create_dataset("embeddings", data=there, compression="gzip")
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        np.testing.assert_array_equal(np.concatenate(list(embeddings.blocks())), there)


def test_ids_given_twice_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ids=["x"] * N)
    with (
        Embeddings.open(tmp_path / "a.h5") as embeddings,
        pytest.raises(FormatError, match=r"a\.h5: some ids stand there twice"),
    ):
        embeddings.rows(["x"])


@pytest.mark.parametrize("keep", [0, 4, 2000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"a\.h5: not a readable HDF5 file"):
        Embeddings.open(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.h5: no such embeddings file; make it with `fedbio embed`"):
        Embeddings.open(tmp_path / "a.h5")


def write_residues(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "info": msgspec.structs.replace(INFO, pooling="residues"),
        "ids": ["a", "b", "c"],
        "lengths": [3, 1, 2],
        "digests": [sequence_digest(name) for name in "abc"],
        "blocks": [VECTORS[:6]],
        "pointers": np.array([0, 3, 4, 6]),
    }
    write_embeddings(path, **(content | changes))
    return path


def test_rows_per_residue_are_one_matrix_with_pointers(tmp_path: Path) -> None:
    with h5py.File(write_residues(tmp_path / "a.h5"), "r") as file:
        assert file["embeddings"].shape == (6, 4)
        assert (file["pointers"].dtype, file["pointers"][:].tolist()) == (np.int64, [0, 3, 4, 6])
        first, last = file["pointers"][1:3]
        np.testing.assert_array_equal(file["embeddings"][first:last], VECTORS[3:4])
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        assert len(embeddings) == 3
        np.testing.assert_array_equal(embeddings.residues("a"), VECTORS[:3])
        np.testing.assert_array_equal(embeddings.residues("c"), VECTORS[4:6])
        np.testing.assert_array_equal(np.concatenate(list(embeddings.blocks())), VECTORS[:6])
        with pytest.raises(
            DataError, match=r"a\.h5: has one row per residue, and one per protein is needed; embed again"
        ):
            embeddings.rows(["a"])
        with pytest.raises(DataError, match="1 of 1 proteins have no embedding, first 'x'"):
            embeddings.residues("x")
    with (
        Embeddings.open(write(tmp_path / "b.h5")) as embeddings,
        pytest.raises(DataError, match=r"has one row per protein, by pooling 'mean'; embed with `--pooling residues`"),
    ):
        embeddings.residues(IDS[0])


@pytest.mark.parametrize("pointers", [[0, 3, 4, 7], [0, 4, 3, 6], [1, 3, 4, 6], [0, 3, 6]])
def test_pointers_that_do_not_fit_are_refused(tmp_path: Path, pointers: list[int]) -> None:
    write_residues(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["pointers"]
        file["pointers"] = pointers
    with pytest.raises(FormatError, match=r"a\.h5: (dataset /pointers does not fit 3 ids|3 ids of width 4 do not fit)"):
        Embeddings.open(tmp_path / "a.h5")


def test_heads_come_in_order_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.h5")
    monkeypatch.setattr("fedbio.embeddings.reading.HEADS", 250)
    with Embeddings.open(tmp_path / "a.h5") as embeddings:
        heads = list(embeddings.heads())
    assert [len(some.ids) for some in heads] == [250, 250, 100]
    assert [name for some in heads for name in some.ids] == IDS
    assert np.concatenate([some.lengths for some in heads]).tolist() == list(range(1, N + 1))
    assert heads[2].digests[99].tobytes() == sequence_digest(IDS[-1])
