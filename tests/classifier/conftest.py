"""A small labelled problem, as arrays and as a site's two files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedbio.classifier import TrainData
from fedbio.embeddings import write_embeddings
from fedbio.proteins import Protein, write_fasta
from fedbio.results import EncoderInfo

WIDTH = 16
CLASSES = ("Cytoplasm", "Extracellular", "Nucleus")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # the machine that runs the tests may have other things to do
    torch.set_num_threads(1)


@pytest.fixture
def classes() -> tuple[str, ...]:
    return CLASSES


@pytest.fixture
def info() -> EncoderInfo:
    """What made the embeddings of `write_site`."""
    return EncoderInfo(
        name="esm1nv-44m",
        weights_sha256="a" * 64,
        trained=False,
        width=WIDTH,
        pooling="mean",
        layer=6,
        dtype="float32",
        max_residues=510,
        long="cut",
    )


def _blobs(count: int, seed: int = 0, spread: float = 1.0) -> TrainData:
    centres = np.random.default_rng(99).normal(0, 1.0, (len(CLASSES), WIDTH))
    targets = np.arange(count) % len(CLASSES)
    features = centres[targets] + spread * np.random.default_rng(seed).normal(size=(count, WIDTH))
    return TrainData(features.astype(np.float32), targets, tuple(f"p{number}" for number in range(count)))


@pytest.fixture
def blobs() -> Callable[..., TrainData]:
    """Make three clouds of points; the same centres for every seed."""
    return _blobs


def _sequence(name: str) -> str:
    return "M" + "".join("ACDEFGHIKLMNPQRSTVWY"[byte % 20] for byte in hashlib.sha256(name.encode()).digest())


@pytest.fixture
def proteins() -> list[Protein]:
    """Ninety proteins p0, p1, ... with the classes of `blobs(90)`; the first 18 are for testing."""
    return [
        Protein(f"p{place}", _sequence(f"p{place}"), CLASSES[place % 3], "test" if place < 18 else "train")
        for place in range(90)
    ]


@pytest.fixture
def write_site(tmp_path: Path, info: EncoderInfo) -> Callable[..., tuple[Path, Path]]:
    """Write ``NAME.fasta`` and ``NAME.h5`` with the embeddings of `blobs`, and return their paths."""

    def write(name: str, proteins: list[Protein], *, encoder: EncoderInfo = info) -> tuple[Path, Path]:
        fasta, store = tmp_path / f"{name}.fasta", tmp_path / f"{name}.h5"
        write_fasta(proteins, fasta)
        write_embeddings(
            store,
            info=encoder,
            ids=[each.id for each in proteins],
            lengths=[len(each.sequence) for each in proteins],
            digests=[hashlib.sha256(each.sequence.encode()).digest() for each in proteins],
            blocks=[_blobs(len(proteins)).features],
        )
        return fasta, store

    return write


RESIDUE_WIDTH = 6


def _residues(proteins: list[Protein]) -> list[NDArray[np.float32]]:
    """Noise for each residue, but for a signal of the protein's class within its first eight residues."""
    found = []
    for protein in proteins:
        random = np.random.default_rng([int(protein.id[1:]), 5])
        rows = random.normal(2.0, 3.0, (len(protein.sequence), RESIDUE_WIDTH)).astype(np.float32)
        rows[random.integers(8), CLASSES.index(protein.target or "")] += 30
        found.append(rows)
    return found


@pytest.fixture
def residues() -> Callable[[list[Protein]], list[NDArray[np.float32]]]:
    """Make embeddings of residues, shape (residues, 6) for each protein."""
    return _residues


@pytest.fixture
def residue_info(info: EncoderInfo) -> EncoderInfo:
    """What made the embeddings of `write_residues`."""
    return msgspec.structs.replace(info, pooling="residues", width=RESIDUE_WIDTH)


@pytest.fixture
def varied() -> list[Protein]:
    """Ninety proteins p0, p1, ... of 9 to 60 residues; the first 18 are for testing."""
    return [
        Protein(
            f"p{place}",
            (_sequence(f"p{place}") * 2)[: 9 + 7 * place % 52],
            CLASSES[place % 3],
            "test" if place < 18 else "train",
        )
        for place in range(90)
    ]


@pytest.fixture
def write_residues(tmp_path: Path, residue_info: EncoderInfo) -> Callable[..., tuple[Path, Path]]:
    """Write ``NAME.fasta`` and ``NAME.h5`` with a row per residue, and return their paths."""

    def write(name: str, proteins: list[Protein]) -> tuple[Path, Path]:
        fasta, store = tmp_path / f"{name}.fasta", tmp_path / f"{name}.h5"
        write_fasta(proteins, fasta)
        lengths = [len(each.sequence) for each in proteins]
        write_embeddings(
            store,
            info=residue_info,
            ids=[each.id for each in proteins],
            lengths=lengths,
            digests=[hashlib.sha256(each.sequence.encode()).digest() for each in proteins],
            blocks=_residues(proteins),
            pointers=np.cumsum([0, *lengths]),
        )
        return fasta, store

    return write
