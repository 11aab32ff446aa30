"""Keep the state of a run on disk, whole or not at all: the last one and the one before."""

from __future__ import annotations

__all__ = ["Progress", "State", "read_last", "write_state"]

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedbio.encoder.pretraining.batches import Place
from fedbio.errors import FormatError
from fedbio.files import whole_file

log = logging.getLogger(__name__)

KEPT = 2


class Progress(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How far a run has come.

    Parameters
    ----------
    place : Place
        Of the next pack.
    step, tokens, masked : int
        Updates, tokens and masked residues until now.
    seconds : float
        Spent in training, over all stretches.
    curve : list of dict
        ``step``, ``tokens``, ``loss``, ``perplexity``, ``residues`` of each validation.
    stretches : list of dict
        ``step``, ``device``, ``threads``, ``processes`` at each start.
    """

    place: Place = Place()
    step: int = 0
    tokens: int = 0
    masked: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = msgspec.field(default_factory=list)
    stretches: list[dict[str, Any]] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: the learner's vectors and numbers, the run's progress, and its recipe."""

    vectors: Mapping[str, Tensor]
    numbers: Mapping[str, str]
    progress: Progress
    recipe: dict[str, Any]


def write_state(folder: Path, state: State) -> Path:
    """Write a checkpoint; once it is there, only the one before is kept beside it.

    Raises
    ------
    MachineError
        If the disk is full; the last checkpoint is untouched.
    """
    vectors = {name: vector.cpu() for name, vector in sorted(state.vectors.items())}
    metadata = {
        **state.numbers,
        "format": "fedbio-pretraining",
        "version": "1",
        "progress": msgspec.json.encode(state.progress).decode(),
        "recipe": msgspec.json.encode(state.recipe).decode(),
    }
    metadata["blake3"] = _digest(vectors, metadata)
    path = folder / f"step-{state.progress.step:09d}.safetensors"
    with whole_file(path) as beside:
        save_file(vectors, beside, metadata=metadata)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def read_last(folder: Path) -> State | None:
    """Read the newest checkpoint that is whole; None if there is none at all.

    Raises
    ------
    FormatError
        If there are checkpoints, and none can be read.
    """
    why: list[str] = []
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            return _read(path)
        except FormatError as error:
            log.warning("checkpoint passed over: %s", error)
            why.append(str(error))
    if why:
        raise FormatError("; ".join([*why, "no checkpoint is left to go on from; delete the folder to begin again"]))
    return None


def _read(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            vectors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if (metadata.get("format"), metadata.get("version")) != ("fedbio-pretraining", "1"):
            raise FormatError(f"{path}: not a checkpoint of a format that this release reads")
        digest = metadata.pop("blake3", "")
        if digest != _digest(vectors, metadata):
            raise FormatError(f"{path}: damaged, its digest is another")
        return State(
            vectors,
            metadata,
            msgspec.json.decode(metadata["progress"], type=Progress),
            msgspec.json.decode(metadata["recipe"], type=dict[str, Any]),
        )
    except (SafetensorError, OSError, KeyError, msgspec.DecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error


def _digest(vectors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = blake3.blake3(msgspec.json.encode(sorted(metadata.items())))
    for vector in vectors.values():
        digest.update(vector.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
