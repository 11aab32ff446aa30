"""Tests that every held-out residue counts once, and that a model's figure does not depend on the rest of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbio.encoder.pretraining import perplexity
from fedbio.encoder.pretraining.corpus import Inputs, corpus_of
from fedbio.encoder.pretraining.perplexity import HeldOut, even_windows
from fedbio.encoder.pretraining.recipe import Recipe

from .conftest import learner_of, write_proteins

RECIPE = Recipe(steps=10, average="none", dtype="float32")


def held_out(tmp_path: Path) -> HeldOut:
    path = write_proteins(tmp_path / "p.fasta", [40, 64, 65, 700, 129, 12])
    proteins = corpus_of(tmp_path / "corpus", Inputs(sources=[path], valid_fraction=0.0)).train
    return HeldOut(proteins, alphabet="esm1nv", max_residues=64)


def test_windows_hold_each_residue_once_and_are_as_even_as_can_be() -> None:
    lengths = np.array([1, 64, 65, 128, 129, 1_000])
    begins, sizes = even_windows(lengths, 64)
    covered = np.concatenate([np.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)])
    assert covered.tolist() == list(range(lengths.sum()))
    assert sizes.tolist()[:8] == [1, 64, 32, 33, 64, 64, 43, 43]
    assert sizes.max() <= 64


def test_all_residues_are_measured_and_two_processes_measure_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "PACK_TOKENS", 256)  # several packs
    learner, whole = learner_of(RECIPE), held_out(tmp_path)
    alone = whole.measure(learner)
    assert alone.residues == 1_010
    assert alone.masked == pytest.approx(0.15 * 1_010, abs=60)
    assert alone.perplexity == pytest.approx(128, rel=0.1)
    sums = torch.zeros(3, dtype=torch.float64)
    for rank in (0, 1):
        whole.measure(learner, share=(rank, 2), join=lambda vector: sums.add_(vector.cpu()))
    assert sums[1:].tolist() == [alone.masked, alone.residues]
    assert math.exp(sums[0] / sums[1]) == pytest.approx(alone.perplexity, rel=1e-9)


def test_a_sample_is_the_same_each_time(tmp_path: Path) -> None:
    learner, whole = learner_of(RECIPE), held_out(tmp_path)
    first = whole.measure(learner, most_residues=300)
    assert 236 <= first.residues <= 300
    assert whole.measure(learner, most_residues=300) == first
