"""Load an encoder from a name, a folder or a file; what a file is, its content says."""

from __future__ import annotations

__all__ = ["Loaded", "load_encoder_weights", "read_encoder", "read_fair_esm"]

import os
from pathlib import Path
from typing import NamedTuple

from fedbio.encoder.checkpoint.fair_esm import read_fair_esm
from fedbio.encoder.checkpoint.huggingface import read_huggingface
from fedbio.encoder.checkpoint.nemo import read_nemo
from fedbio.encoder.untrained import BUILT_IN, untrained_weights
from fedbio.encoder_files import file_form, look_into
from fedbio.encoder_names import find_encoder, packaged_path
from fedbio.errors import FormatError
from fedbio.training_account import TRAINING_FILE, TrainingAccount, read_account
from fedbio.weights import EncoderConfig, Weights, read_weights, weights_digest


class Loaded(NamedTuple):
    """An encoder and where it comes from."""

    config: EncoderConfig
    weights: Weights
    """With the tensors of the language-model head, ``lm_head.*``, where the source has one."""
    form: str
    """``"built in"``, ``"fedbio"``, ``"huggingface"``, ``"fair-esm"`` or ``"nemo"``."""
    path: Path | None
    """File or folder; None for a built-in architecture."""
    sha256: str
    """`fedbio.weights.weights_digest` of the weights."""
    account: TrainingAccount | None = None
    """How it was trained, where a folder of ours says so; it is of these weights."""


def load_encoder_weights(encoder: str | os.PathLike[str], *, seed: int = 0) -> tuple[EncoderConfig, Weights]:
    """Load an architecture and its weights; see `read_encoder`."""
    loaded = read_encoder(encoder, seed=seed)
    return loaded.config, loaded.weights


def read_encoder(
    encoder: str | os.PathLike[str], *, seed: int = 0, cache: str | os.PathLike[str] | None = None
) -> Loaded:
    """Load an architecture and its weights, and say of what form the source is.

    Parameters
    ----------
    encoder : str or path-like
        An encoder folder, ours or Hugging Face's; a fair-esm ``.pt`` file; a BioNeMo ``.nemo`` archive; a name of an
        encoder that comes with fedbio, or one in the cache (`fedbio.encoder_names`); or a name of
        `fedbio.encoder.untrained.BUILT_IN`. Nothing is downloaded.
    seed : int
        Of the random weights of a built-in architecture.
    cache : path-like, optional
        Another cache folder than this machine's.

    Raises
    ------
    SettingsError
        If `encoder` is neither a known name nor a path.
    FormatError
        If the files are damaged or of an unknown kind, or are not the weights of which their account tells.
    """
    path = find_encoder(os.fspath(encoder), cache, built_in=BUILT_IN)
    if path is None:
        config = BUILT_IN[os.fspath(encoder)]
        return _loaded((config, untrained_weights(config, seed)), "built in", None)
    if path.is_dir():
        folder = look_into(path)
        if folder.form == "huggingface":
            return _loaded(read_huggingface(folder), folder.form, path)
        loaded = _loaded(read_weights(path), folder.form, path)
        return loaded._replace(account=_account(path, loaded.sha256))
    if file_form(path) == "torch":
        return _loaded(read_fair_esm(path), "fair-esm", path)
    return _loaded(read_nemo(path), "nemo", path)


def _loaded(read: tuple[EncoderConfig, Weights], form: str, path: Path | None) -> Loaded:
    config, weights = read
    return Loaded(config, weights, form, path, weights_digest(weights))


def _account(folder: Path, sha256: str) -> TrainingAccount | None:
    """Read how it was trained; the weights are those that it tells of, or one of the two files is not what it was."""
    account = read_account(folder)
    if account is not None and account.weights_sha256 != sha256:
        raise FormatError(
            f"{folder}: its weights have SHA-256 {sha256}, but {TRAINING_FILE} is of {account.weights_sha256}: "
            f"one of them is damaged, or they are of two encoders; {_remedy(folder)}"
        )
    return account


def _remedy(folder: Path) -> str:
    if packaged_path(folder.name) == folder:
        return "install fedbio again"
    return f"get the folder again, or, if its weights were meant to change, take {TRAINING_FILE} away"
