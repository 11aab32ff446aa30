"""What inference starts from: the proteins of a file, the right encoder, and how it shall compute."""

from __future__ import annotations

__all__ = ["BATCH_RESIDUES", "EncoderChoice", "Setup", "Source", "StrPath"]

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import Embeddings, sequence_digest
from fedbio.encoder.checkpoint import load_encoder_weights
from fedbio.encoder.inference import Inference, choose_device, choose_dtype
from fedbio.encoder.packs import Plan, make_plan
from fedbio.errors import RefusedError
from fedbio.proteins import read
from fedbio.results import EncoderInfo
from fedbio.weights import EncoderConfig, Weights, weights_digest

log = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]

BATCH_RESIDUES = {"cpu": 2048, "cuda": 65_536}
"""Tokens of a pack by kind of device, where the caller names no number."""


class Source:
    """The proteins of a file as inference wants them: ids, lengths, digests, and each distinct sequence once."""

    def __init__(
        self,
        path: StrPath,
        *,
        labels: StrPath | None = None,
        classes: Sequence[str] = COMPARTMENTS,
        skip_invalid: bool = False,
    ) -> None:
        self.ids: list[str] = []
        self.lengths: list[int] = []
        self.digests: list[bytes] = []
        self.sequences: dict[bytes, bytes] = {}
        for protein in read(path, labels=labels, classes=classes, skip_invalid=skip_invalid):
            digest = sequence_digest(protein.sequence)
            self.ids.append(protein.id)
            self.lengths.append(len(protein.sequence))
            self.digests.append(digest)
            self.sequences.setdefault(digest, protein.sequence.encode())

    def is_in(self, embeddings: Embeddings) -> bool:
        """Whether a file holds exactly these proteins in this order."""
        return embeddings.ids == self.ids and embeddings.digests.tobytes() == b"".join(self.digests)

    def longer_than(self, residues: int) -> int:
        """How many proteins are longer than so many residues."""
        return sum(length > residues for length in self.lengths)


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder, and how it shall compute; the fields are those of `fedbio.encoder.embed_file`."""

    encoder: StrPath = "esm1nv-44m"
    seed: int = 0
    expected_sha256: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    long: Literal["cut", "window"] = "cut"
    batch_residues: int | None = None
    threads: int | None = None


class Setup:
    """An encoder's weights, checked, and the device and arithmetic that it will use.

    Raises
    ------
    RefusedError
        If the weights have another digest than is expected.
    """

    def __init__(self, choice: EncoderChoice) -> None:
        self.choice = choice
        self.device = choose_device(choice.device)
        self.dtype = choose_dtype(choice.dtype, self.device)
        self.config, self.weights = load_encoder_weights(choice.encoder, seed=choice.seed)
        self.info = _encoder_info(self.config, self.weights, dtype=self.dtype, long=choice.long)
        self.budget = choice.batch_residues or BATCH_RESIDUES[self.device.type]
        expected = choice.expected_sha256
        if expected is not None and self.info.weights_sha256 != expected:
            raise RefusedError(
                f"encoder {str(choice.encoder)!r}: its weights have SHA-256 {self.info.weights_sha256}, "
                f"but {expected} is expected; nothing was embedded"
            )
        if not self.info.trained:
            log.warning("untrained encoder name=%s sha256=%.12s", self.info.name, self.info.weights_sha256)

    def plan(self, sequences: list[bytes]) -> Plan:
        """Plan the packs for some distinct sequences."""
        return make_plan(
            [len(residues) for residues in sequences],
            max_residues=self.info.max_residues,
            windows=self.info.long == "window",
            budget=self.budget,
        )

    def inference(self) -> Inference:
        """Put the encoder on its device."""
        return Inference(self.config, self.weights, device=self.device, dtype=self.dtype, threads=self.choice.threads)


def _encoder_info(
    config: EncoderConfig, weights: Weights, *, dtype: torch.dtype, long: Literal["cut", "window"]
) -> EncoderInfo:
    return EncoderInfo(
        name=config.name,
        weights_sha256=weights_digest(weights),
        trained=config.trained,
        width=config.width,
        pooling="mean",
        layer=config.layers,
        dtype=str(dtype).removeprefix("torch."),
        max_residues=config.max_residues,
        long=long,
    )
