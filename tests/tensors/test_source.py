from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedbio.errors import FormatError, ProtocolError
from fedbio.tensors import TensorFile, check_file, manifest, write_file
from fedbio.tensors.source import RUN_VALUES

F = np.float32
WEIGHTS = {
    "w": np.arange(2 * RUN_VALUES + 5, dtype=F),
    "count": np.array(3, np.int64),
    "empty": np.zeros((0, 2), F),
    "half": np.arange(3, dtype=np.float16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_file(path, WEIGHTS)
    return path


def test_runs_of_a_file_are_read_into_the_readers_memory(path: Path) -> None:
    with TensorFile(path) as file:
        assert file.manifest == manifest(WEIGHTS)
        out = np.empty(10, F)
        file.read("w", 1_000, out)
        assert out.tolist() == [*range(1_000, 1_010)]
        half = np.empty(2, np.float16)
        file.read("half", 1, half)
        assert half.tolist() == [1, 2]
        file.release("w", 1_000)


@pytest.mark.parametrize(("start", "dtype"), [(2 * RUN_VALUES, F), (0, np.float64)])
def test_run_that_the_tensor_does_not_have_is_a_bug(path: Path, start: int, dtype: type) -> None:
    with TensorFile(path) as file, pytest.raises(ValueError, match="tensor 'w': values"):
        file.read("w", start, np.empty(6, dtype))


@pytest.mark.parametrize("keep", [0, 5, 100, 500_000])
def test_file_cut_short_is_refused_with_its_path(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors: .*; get a fresh copy"):
        TensorFile(path)


def test_file_cut_short_while_it_is_read_is_refused(path: Path) -> None:
    with TensorFile(path) as file:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(FormatError, match="cut short while it was read"):
            file.read("half", 0, np.empty(3, np.float16))


def test_file_that_matches_is_taken(path: Path) -> None:
    check_file(path, manifest(WEIGHTS))


def test_file_that_differs_or_is_not_finite_is_refused_by_name(path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"site-1: tensor 'half': float16 \[3\], expected float32 \[3\]"):
        check_file(path, {**manifest(WEIGHTS), "half": ((3,), np.dtype(F))}, source="site-1")
    bad = WEIGHTS["w"].copy()
    bad[RUN_VALUES + 3] = np.nan
    write_file(path, {**WEIGHTS, "w": bad})
    with pytest.raises(ProtocolError, match=f"site-1: tensor 'w': value {RUN_VALUES + 3} is not finite"):
        check_file(path, manifest(WEIGHTS), source="site-1")
