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
from fedbio.encoder_names import find_encoder
from fedbio.weights import EncoderConfig, Weights, read_weights


class Loaded(NamedTuple):
    """An encoder and where it comes from."""

    config: EncoderConfig
    weights: Weights
    """With the tensors of the language-model head, ``lm_head.*``, where the source has one."""
    form: str
    """``"built in"``, ``"fedbio"``, ``"huggingface"``, ``"fair-esm"`` or ``"nemo"``."""
    path: Path | None
    """File or folder; None for a built-in architecture."""


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
        A name of `fedbio.encoder.untrained.BUILT_IN`; an encoder folder, ours or Hugging Face's; a fair-esm ``.pt``
        file; a BioNeMo ``.nemo`` archive; or a name in the cache (`fedbio.encoder_names`). Nothing is downloaded.
    seed : int
        Of the random weights of a built-in architecture.
    cache : path-like, optional
        Another cache folder than this machine's.

    Raises
    ------
    SettingsError
        If `encoder` is neither a known name nor a path.
    FormatError
        If the files are damaged or of an unknown kind.
    """
    path = find_encoder(os.fspath(encoder), cache, built_in=BUILT_IN)
    if path is None:
        config = BUILT_IN[os.fspath(encoder)]
        return Loaded(config, untrained_weights(config, seed), "built in", None)
    if path.is_dir():
        folder = look_into(path)
        read = read_weights(path) if folder.form == "fedbio" else read_huggingface(folder)
        return Loaded(*read, folder.form, path)
    if file_form(path) == "torch":
        return Loaded(*read_fair_esm(path), "fair-esm", path)
    return Loaded(*read_nemo(path), "nemo", path)
