"""The initial model that a running script makes between two of its own draws."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbio.client.initial import TORCH_SEED, made_apart

MODEL = """
import random

import numpy as np
import torch

random.seed(5)
np.random.seed(5)
torch.manual_seed(5)


def net():
    random.random(), np.random.random()
    return torch.nn.Linear(2, 1)
"""


def test_a_script_draws_what_it_would_have_drawn_without_the_initial_model(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    make = made_apart(f"{tmp_path / 'model.py'}:net")

    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(1))]  # noqa: NPY002 - what scripts use

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    alone = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    assert set(make().params or {}) == {"weight", "bias"}
    assert draw() == alone


def test_torch_begins_with_the_seed_that_is_put_back_where_the_model_has_loaded_it() -> None:
    assert torch.Generator().initial_seed() == TORCH_SEED


def test_missing_function_ends_the_script_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").write_text("import os\n")
    with pytest.raises(SystemExit) as caught:
        made_apart(f"{tmp_path / 'model.py'}:net")()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "client.initial: model.py has no function net; it has none\n"
