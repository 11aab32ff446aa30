"""What inference starts from: the right encoder, and how it shall compute."""

from __future__ import annotations

__all__ = ["BATCH_RESIDUES", "EncoderChoice", "Setup"]

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedbio.encoder.bins import bins_name
from fedbio.encoder.checkpoint import read_encoder
from fedbio.encoder.inference import Inference, choose_device, choose_dtype
from fedbio.encoder.memory import bound_kernel_caches, fitting_budget, fitting_lanes, needed_bytes
from fedbio.encoder.packs import Plan, make_plan
from fedbio.encoder.pooling import Pooling, row_width
from fedbio.encoder.source import StrPath
from fedbio.encoder_names import DEFAULT_ENCODER
from fedbio.errors import RefusedError, SettingsError
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)

BATCH_RESIDUES = {"cpu": 2048, "cuda": 65_536}
"""Tokens of a pack by kind of device, where the caller names no number."""


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder, and how it shall compute; the fields are those of `fedbio.encoder.embed_file`."""

    encoder: StrPath = DEFAULT_ENCODER
    seed: int = 0
    expected_sha256: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    long: Literal["cut", "window"] = "window"
    pooling: Pooling = "mean"
    layer: int | None = None
    batch_residues: int | None = None
    threads: int | None = None
    memory: int | None = None


class Setup:
    """An encoder's weights, checked, and the device and arithmetic that it will use.

    Parameters
    ----------
    choice : EncoderChoice
        Of several devices, the first is looked at; all must do the same.

    Attributes
    ----------
    info : EncoderInfo
    budget : int
        The most tokens in a pack.
    lanes : int
        Threads that compute at the same time.
    needed_bytes : int
        Memory that this process takes, without what grows with the proteins.

    Raises
    ------
    SettingsError
        If the encoder does not have so many layers, or there is no such arithmetic or device.
    MachineError
        If the memory allowed is not enough for the encoder.
    RefusedError
        If the weights have another digest than is expected.
    """

    def __init__(self, choice: EncoderChoice) -> None:
        bound_kernel_caches()
        self.choice = choice
        self.device = choose_device(choice.device.split(",")[0].strip())
        self.dtype = choose_dtype(choice.dtype, self.device)
        loaded = read_encoder(choice.encoder, seed=choice.seed)
        self.config, self.weights, digest = loaded.config, loaded.weights, loaded.sha256
        if choice.expected_sha256 not in (None, digest):
            raise RefusedError(
                f"encoder {str(choice.encoder)!r}: its weights have SHA-256 {digest}, "
                f"but {choice.expected_sha256} is expected; nothing was embedded"
            )
        self.info = self._find_info(digest, None if loaded.account is None else loaded.account.perplexity)
        self.budget, self.lanes, self.needed_bytes = self._find_budget()
        if not self.info.trained:
            log.warning("untrained encoder name=%s sha256=%.12s", self.info.name, digest)

    def plan(self, sequences: Sequence[bytes]) -> Plan:
        """Plan the packs of a few sequences that are in memory."""
        lengths = [len(residues) for residues in sequences]
        windows = self.info.long == "window"
        return make_plan(lengths, max_residues=self.info.max_residues, windows=windows, budget=self.budget)

    def inference(self) -> Inference:
        """Put the encoder on its device."""
        choice = self.choice
        return Inference(
            self.config,
            self.weights,
            device=self.device,
            dtype=self.dtype,
            threads=self.lanes,
            pooling=choice.pooling,
            layer=choice.layer,
        )

    def _find_info(self, digest: str, perplexity: float | None) -> EncoderInfo:
        choice, config = self.choice, self.config
        if choice.pooling not in get_args(Pooling):
            raise SettingsError(f"pooling {choice.pooling!r}: expected {', '.join(get_args(Pooling))}")
        layer = config.layers if choice.layer is None else choice.layer
        if not 0 <= layer <= config.layers:
            raise SettingsError(f"layer {layer}: {config.name} has layers 0 to {config.layers}")
        return EncoderInfo(
            name=config.name,
            weights_sha256=digest,
            trained=config.trained,
            width=row_width(config.width, choice.pooling),
            pooling=choice.pooling,
            layer=layer,
            dtype=str(self.dtype).removeprefix("torch."),
            max_residues=config.max_residues,
            long=choice.long,
            perplexity=perplexity,
            bins=bins_name() if choice.pooling == "ends" else "",
        )

    def _find_budget(self) -> tuple[int, int, int]:
        size = sum(tensor.nbytes for tensor in self.weights.values())
        on_cpu = self.device.type == "cpu"
        width, memory = self.info.width, self.choice.memory
        budget = self.choice.batch_residues or fitting_budget(
            self.config,
            size,
            default=BATCH_RESIDUES[self.device.type],
            memory=memory,
            on_cpu=on_cpu,
            row_width=width,
        )
        lanes = fitting_lanes(
            self.config,
            size,
            threads=self.choice.threads or len(os.sched_getaffinity(0)),
            budget=budget,
            memory=memory,
            on_cpu=on_cpu,
            row_width=width,
        )
        needed = needed_bytes(self.config, size, budget=budget, on_cpu=on_cpu, row_width=width, lanes=lanes)
        return budget, lanes, needed
