"""Which files make an encoder, and of what form they are, told by content and without torch."""

from __future__ import annotations

__all__ = ["INDEX_SUFFIX", "EncoderFolder", "file_form", "look_into"]

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbio.errors import FormatError
from fedbio.training_account import TRAINING_FILE
from fedbio.vocabularies import VOCABULARY_FILE
from fedbio.weights import CONFIG_FILE, WEIGHTS_FILE

INDEX_SUFFIX = ".index.json"
"""What follows the name of the whole file in that of the list of its parts."""

_TORCH_FILE = "pytorch_model.bin"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_JSON_BYTES = 16 << 20
_MAX_SHARDS = 1000

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
"""How files of ``torch.save`` begin: since torch 1.6 zip archives, before that pickles one after the other."""
_GZIP = b"\x1f\x8b"
_TAR = slice(257, 262), b"ustar"


@dataclass(frozen=True)
class EncoderFolder:
    """What lies in an encoder folder.

    Parameters
    ----------
    path : Path
    form : str
        ``"fedbio"`` or ``"huggingface"``.
    config : dict
        What ``config.json`` holds.
    weights : tuple of Path
        One file, or all parts of a divided one.
    beside : tuple of Path
        The other files that belong to it: the configuration, the list of parts, the vocabulary, how it was trained.
    """

    path: Path
    form: Literal["fedbio", "huggingface"]
    config: dict[str, Any]
    weights: tuple[Path, ...]
    beside: tuple[Path, ...]


def file_form(path: Path) -> Literal["torch", "tar"]:
    """Return what a checkpoint in one file is: of ``torch.save`` (fair-esm), or a tar archive, perhaps gzip (BioNeMo).

    Raises
    ------
    FormatError
        If it is neither.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith((_ZIP, _PICKLE)):
        return "torch"
    if start.startswith(_GZIP) or start[_TAR[0]] == _TAR[1]:
        return "tar"
    raise FormatError(
        f"{path}: neither a torch file (fair-esm's .pt) nor a tar archive (BioNeMo's .nemo); "
        "of safetensors give the folder, with its config.json"
    )


def look_into(folder: Path) -> EncoderFolder:
    """Find out whose folder it is and which files belong to it.

    Raises
    ------
    FormatError
        If it is of no known form, or files are missing.
    """
    settings = folder / CONFIG_FILE
    if not settings.is_file():
        if (folder / "model_config.yaml").is_file():
            raise FormatError(
                f"{folder}: an unpacked .nemo archive; give the archive, or pack it again: "
                f"tar -cf {folder.name}.nemo -C {folder} ."
            )
        raise FormatError(
            f"{settings}: not found; an encoder folder, ours or Hugging Face's, holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = _read_json(settings)
    if str(config.get("format", "")).startswith("fedbio"):
        form: Literal["fedbio", "huggingface"] = "fedbio"
        lists: tuple[Path, ...] = ()
        weights: tuple[Path, ...] = (_there(folder / WEIGHTS_FILE),)
    elif "model_type" in config:
        form = "huggingface"
        lists, weights = _weights(folder)
    else:
        raise FormatError(
            f"{settings}: says neither 'format' (an encoder folder of fedbio) nor 'model_type' (of Hugging Face); "
            "was it copied completely?"
        )
    known = [VOCABULARY_FILE, TRAINING_FILE] if form == "fedbio" else [VOCABULARY_FILE]
    beside = (settings, *lists, *(folder / name for name in known if (folder / name).is_file()))
    return EncoderFolder(folder, form, config, weights, beside)


def _weights(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the list of parts, if there is one, and the files with tensors; safetensors before pickles."""
    for name in (WEIGHTS_FILE, _TORCH_FILE):
        if (folder / name).is_file():
            return (), (folder / name,)
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            parts = _read_json(index).get("weight_map")
            if not isinstance(parts, dict) or not parts:
                raise FormatError(f"{index}: has no 'weight_map'; get a fresh copy")
            names = sorted({str(part) for part in parts.values()})
            if len(names) > _MAX_SHARDS or any(not _SHARD.fullmatch(part) for part in names):
                raise FormatError(f"{index}: names parts that are no plain file names in the same folder; not followed")
            return (index,), tuple(_there(folder / part) for part in names)
    raise FormatError(f"{folder}: neither {WEIGHTS_FILE} nor {_TORCH_FILE} (whole or in parts) is there; copy it again")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FormatError(f"{path}: not found; the folder is not complete, copy it again")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise FormatError(f"{path}: {size:,} bytes, more than the {_MAX_JSON_BYTES:,} allowed")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); get a fresh copy") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: not a JSON object; get a fresh copy")
    return content
