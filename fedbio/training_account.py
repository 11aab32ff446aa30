"""Read how an encoder was trained from the account beside its weights, without torch."""

from __future__ import annotations

__all__ = ["TRAINING_FILE", "TrainingAccount", "read_account", "read_raw_account"]

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fedbio.errors import FormatError

TRAINING_FILE = "training.json"
_MAX_BYTES = 16 << 20

# between a network that is always right and one that is worse than any can be: no infinity reaches tables and records
_Perplexity = Annotated[float, msgspec.Meta(ge=1, lt=1e30)]


class CurvePoint(msgspec.Struct, frozen=True):
    """One validation: after so many updates and tokens, and on so many masked residues, the perplexity.

    A run that has gone astray may have none that a number can hold. `final` says that it was measured at the end, with
    the weights that were written and on all that was held out.
    """

    step: int
    tokens: int
    perplexity: _Perplexity | None = None
    masked: int = 0
    final: bool = False


class TrainingAccount(msgspec.Struct, frozen=True):
    """What this release reads of ``training.json``; more may stand there.

    Parameters
    ----------
    weights_sha256 : str
        `fedbio.weights.weights_digest` of the weights beside it.
    encoder : str
        What it is called.
    parameters : int
        With the language-model head.
    finished : bool
        Whether the schedule was gone through to its end.
    tokens : int
        That were learnt from, start and end tokens and repeated epochs counted.
    curve : tuple of CurvePoint
    """

    weights_sha256: str
    encoder: str
    parameters: int
    finished: bool
    tokens: int
    curve: tuple[CurvePoint, ...] = ()
    format: Literal["fedbio-training"] = "fedbio-training"
    version: Literal[1] = 1

    @property
    def perplexity(self) -> float | None:
        """The last one that was measured; None without held-out proteins, or if it was beyond all measure."""
        return self.curve[-1].perplexity if self.curve else None


def read_raw_account(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return all that the account of an encoder folder says, or None if it has none.

    Raises
    ------
    FormatError
        If it is damaged or too large.
    """
    path = Path(folder) / TRAINING_FILE
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise FormatError(f"{path}: {size:,} bytes, more than the {_MAX_BYTES:,} allowed")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); get a fresh copy, or take it away") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: not a JSON object; get a fresh copy, or take it away")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def read_account(folder: str | os.PathLike[str]) -> TrainingAccount | None:
    """Return the account of an encoder folder, or None if it has none.

    Raises
    ------
    FormatError
        If it is damaged, or of a version that this release cannot read.
    """
    raw = read_raw_account(folder)
    if raw is None:
        return None
    try:
        return msgspec.convert(raw, TrainingAccount)
    except msgspec.ValidationError as error:
        raise FormatError(
            f"{Path(folder) / TRAINING_FILE}: not an account that this release can read (format fedbio-training, "
            f"version 1): {error}; get a fresh copy, or take it away"
        ) from error
