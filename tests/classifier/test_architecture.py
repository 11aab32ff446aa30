from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from fedbio.classifier.architecture import check_parameters, format_hidden, initialize, layer_widths
from fedbio.errors import DataError
from fedbio.settings import parse_hidden


def test_first_parameters_are_these_bits_on_every_machine() -> None:
    parameters = initialize(768, (512, 256, 128, 64), 10, seed=0)
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(parameters[name].tobytes())
    assert digest.hexdigest() == "337fe7dc9dc689ac40ff652bcbf857ef7e74d052b0ad36d8902361251ee45055"


def test_first_parameters_are_uniform_as_those_of_torch() -> None:
    parameters = initialize(400, (300,), 10, seed=3)
    weight = parameters["layers.0.weight"]
    assert weight.dtype == np.float32
    assert 0.0499 < weight.max() < 0.05
    assert -0.05 < weight.min() < -0.0499
    # 120,000 uniform numbers: the mean's standard error is 0.00008
    assert abs(weight.mean()) < 0.0004
    assert weight.std() == pytest.approx(0.05 / 3**0.5, rel=0.01)
    assert np.abs(parameters["layers.1.bias"]).max() < 300**-0.5


def test_first_parameters_differ_between_seeds_and_layers() -> None:
    first, second = (initialize(8, (8, 8), 8, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first["layers.0.weight"], second["layers.0.weight"])
    assert not np.array_equal(first["layers.0.weight"], first["layers.1.weight"])


def test_parameters_are_made_and_measures_taken_without_torch() -> None:
    code = (
        "import sys, fedbio.classifier as c; c.initialize(8, (4,), 2, seed=0); c.macro_f1; c.Standardizer; "
        "c.choose_threshold; sys.exit(bool({'torch', 'sklearn', 'h5py'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_hidden_layers_have_a_name() -> None:
    assert format_hidden((256, 128, 64)) == "256-128-64"
    assert parse_hidden(format_hidden((32,))) == (32,)


def test_widths_are_found_from_the_parameters() -> None:
    assert layer_widths(initialize(768, (32, 16), 10, seed=0)) == (768, 32, 16, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers.1.weight": None},
            "a weight and a bias for each layer of an MLP, found layers.0.weight, layers.0.bias,",
        ),
        ({"layers.1.weight": None, "layers.2.weight": np.zeros((3, 4), np.float32)}, "layers.1 of an MLP is missing"),
        ({"layers.1.weight": np.zeros((3, 5), np.float32)}, r"layers.1: shapes \(3, 5\)"),
        ({"layers.0.bias": np.zeros(4, np.float64)}, "layers.0: expected float32, found float32 and float64"),
        ({"extra": np.zeros(4, np.float32)}, "a weight and a bias for each layer"),
    ],
)
def test_tensors_that_are_no_mlp_are_refused(change: dict[str, np.ndarray | None], message: str) -> None:
    changed = {**initialize(8, (4,), 3, seed=0), **change}
    with pytest.raises(DataError, match=message):
        layer_widths({name: array for name, array in changed.items() if array is not None})


def test_parameters_of_another_mlp_are_refused() -> None:
    with pytest.raises(DataError, match="widths 8-4-3 instead of 8-5-3"):
        check_parameters(initialize(8, (4,), 3, seed=0), width=8, hidden=(5,), classes=3)
