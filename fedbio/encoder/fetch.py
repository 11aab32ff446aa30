"""Bring a public checkpoint into the cache, because somebody has asked for it."""

from __future__ import annotations

__all__ = ["fetch_encoder"]

import difflib
import os
import urllib.error
from pathlib import Path

from fedbio.encoder_names import KNOWN, cache_folder
from fedbio.errors import SettingsError, TransportError
from fedbio.proteins.download import download
from fedbio.vocabularies import VOCABULARY_FILE
from fedbio.weights import CONFIG_FILE, WEIGHTS_FILE

_TORCH_FILE = "pytorch_model.bin"


def fetch_encoder(name: str, cache: str | os.PathLike[str] | None = None, *, address: str | None = None) -> Path:
    """Download a known checkpoint unless it is there; each file appears whole, and is held to its first SHA-256.

    Parameters
    ----------
    name : str
        One of `fedbio.encoder_names.KNOWN`.
    cache : path-like, optional
        See `fedbio.encoder_names.cache_folder`.
    address : str, optional
        Of a mirror: of the file itself, or what the names of a folder's files are appended to.

    Returns
    -------
    Path
        The file or folder.

    Raises
    ------
    SettingsError
        If no checkpoint is known by this name.
    PeerUnreachable, TransportError, RefusedError
        See `fedbio.proteins.download.download`.
    """
    known = KNOWN.get(name)
    if known is None:
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "see 'fedbio encoder list'"
        raise SettingsError(f"encoder {name!r}: no checkpoint is known by this name; {hint}")
    address = address or known.address
    target = cache_folder(cache) / name
    if not known.folder:
        return download(address, target.with_name(f"{target.name}.pt"))
    address = address.rstrip("/")
    _fetch_weights(address, target)
    download(f"{address}/{VOCABULARY_FILE}", target / VOCABULARY_FILE)
    # the folder is found by its configuration: that comes when all else is there
    download(f"{address}/{CONFIG_FILE}", target / CONFIG_FILE)
    return target


def _fetch_weights(address: str, target: Path) -> None:
    """Fetch safetensors, or where the publisher has none, what came before them."""
    if (target / _TORCH_FILE).exists():
        download(f"{address}/{_TORCH_FILE}", target / _TORCH_FILE)
        return
    try:
        download(f"{address}/{WEIGHTS_FILE}", target / WEIGHTS_FILE)
    except TransportError as error:
        if not (isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 404):
            raise
        download(f"{address}/{_TORCH_FILE}", target / _TORCH_FILE)
