"""A small corpus, a tiny architecture, and the command as a person calls it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbio.encoder.pretraining import run
from fedbio.encoder.pretraining.beginning import first_weights
from fedbio.encoder.pretraining.learner import Learner
from fedbio.encoder.pretraining.recipe import Recipe
from fedbio.weights import EncoderConfig

TINY = EncoderConfig(name="tiny", trained=True, layers=2, heads=2, width=32, ffn=64, max_tokens=66)

ARCHITECTURE = ["--layers", "2", "--heads", "2", "--width", "32", "--ffn", "64", "--max-tokens", "66"]
"""The same as options."""

RECIPE = [
    "--steps",
    "12",
    "--packs",
    "2",
    "--pack-tokens",
    "256",
    "--valid-every",
    "4",
    "--threads",
    "1",
    "--dtype",
    "float32",
]

Command = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread on a busy machine slows such small networks down; and other tests want their memory back."""
    torch.set_num_threads(1)
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)


def write_proteins(path: Path, lengths: list[int], seed: int = 0) -> Path:
    """Write random proteins named p0, p1, ..."""
    random = np.random.default_rng(seed)
    path.write_text(
        "".join(
            f">p{number}\n{''.join(random.choice(list('ACDEFGHIKLMNPQRSTVWY'), length))}\n"
            for number, length in enumerate(lengths)
        )
    )
    return path


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    """Forty proteins, some of them longer than the model."""
    return write_proteins(tmp_path / "proteins.fasta", [20 + 3 * number for number in range(40)])


@pytest.fixture
def command(proteins: Path, tmp_path: Path) -> Command:
    """The command line of a tiny run, with options of the test's own."""

    def make(*options: str, output: str = "out") -> list[str]:
        call = ["pretrain", str(proteins), "-o", str(tmp_path / output), "--no-tensorboard", "--valid-fraction", "0.2"]
        return [*call, *ARCHITECTURE, *RECIPE, *options]

    return make


def fedbio(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "fedbio", *arguments], capture_output=True, text=True, timeout=240)


def learner_of(recipe: Recipe, config: EncoderConfig = TINY) -> Learner:
    """A learner on the CPU with first weights."""
    return Learner(config, first_weights(config, recipe.seed), recipe, device=torch.device("cpu"))
