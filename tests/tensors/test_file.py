from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedbio.errors import FormatError
from fedbio.tensors import open_file, write_file

WEIGHTS = {"w": np.arange(600_000, dtype=np.float32).reshape(600, 1000), "b": np.ones(3, np.float32)}


def test_file_comes_back_mapped_and_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, WEIGHTS, {"note": "x"})
    for read in (open_file(path), load_file(path)):
        assert read.keys() == WEIGHTS.keys()
        np.testing.assert_array_equal(read["w"], WEIGHTS["w"])
    assert not open_file(path)["w"].flags.writeable
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, 2_000_000])
def test_file_cut_short_is_refused_with_its_path(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors: .*; (write it again|get a fresh copy)"):
        open_file(path)
