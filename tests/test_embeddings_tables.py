"""Tests of embeddings as a NumPy array and as a Parquet table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedbio.cli import main
from fedbio.embeddings import sequence_digest, write_embeddings
from fedbio.embeddings_tables import to_npy, to_parquet
from fedbio.errors import DataError, MachineError
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


def store(path: Path, proteins: int, info: EncoderInfo = INFO) -> Path:
    write_embeddings(
        path,
        info=info,
        ids=[f"P{number}" for number in range(proteins)],
        lengths=[2] * proteins,
        digests=[sequence_digest("MK")] * proteins,
        blocks=[np.arange(proteins * 3, dtype=np.float32).reshape(-1, 3)],
        pointers=np.arange(proteins + 1) if info.pooling == "residues" else None,
    )
    return path


def test_npy_is_mapped_by_numpy_with_its_ids_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = store(tmp_path / "a.h5", 1000)
    assert main(["embeddings", "convert", str(source), "-o", str(tmp_path / "out.npy")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/out.npy: 1,000 proteins",
        f"{tmp_path}/out.ids.txt: their ids, in order",
    ]
    matrix = np.load(tmp_path / "out.npy", mmap_mode="r", allow_pickle=False)
    assert (matrix.shape, matrix.dtype) == ((1000, 3), np.float32)
    assert matrix[999].tolist() == [2997, 2998, 2999]
    assert (tmp_path / "out.ids.txt").read_text().splitlines() == [f"P{number}" for number in range(1000)]


def test_parquet_is_read_by_pandas(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd
    import pyarrow.parquet

    assert to_parquet(store(tmp_path / "a.h5", 1000), tmp_path / "out.parquet") == 1000
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert list(table.columns) == ["id", "length", "sha256", "embedding"]
    assert table.id[999] == "P999"
    assert table.embedding[999].tolist() == [2997, 2998, 2999]
    assert table.sha256[0] == sequence_digest("MK").hex()
    metadata = pyarrow.parquet.read_schema(tmp_path / "out.parquet").metadata
    assert json.loads(metadata[b"fedbio"]) == msgspec.to_builtins(INFO)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MachineError, match=r"out\.parquet: writing Parquet needs the package pyarrow.*pip install pyarrow"
    ):
        to_parquet(store(tmp_path / "a.h5", 3), tmp_path / "out.parquet")


def test_rows_per_residue_make_no_table(tmp_path: Path) -> None:
    source = store(tmp_path / "a.h5", 3, msgspec.structs.replace(INFO, pooling="residues"))
    with pytest.raises(DataError, match=r"a\.h5: has one row per residue, and one per protein is needed"):
        to_npy(source, tmp_path / "out.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
