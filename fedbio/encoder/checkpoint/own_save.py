"""Write an encoder as a folder of ours, with the account of its training and a model card if it was trained by us."""

from __future__ import annotations

__all__ = ["Written", "write_own"]

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fedbio.encoder.checkpoint import Loaded
from fedbio.errors import DataError, FormatError
from fedbio.files import write_whole
from fedbio.model_card import CARD_FILE, is_card, model_card
from fedbio.training_account import TRAINING_FILE, read_raw_account
from fedbio.weights import WEIGHTS_FILE, EncoderConfig, read_weights, weights_digest, write_weights
from fedbio.weights_file import WeightForm


class Written(NamedTuple):
    """What lies in the folder now: the digest of its weights, and the bytes of their file."""

    sha256: str
    bytes: int


def write_own(folder: Path, loaded: Loaded, config: EncoderConfig, form: WeightForm) -> Written:
    """Write configuration, weights and vocabulary, and beside them what is known of the training.

    Of a folder that ``fedbio pretrain`` made, ``training.json`` comes along, with the digest of the weights as they are
    written and, if they were rounded, that of the original; the corpus, the checkpoints and the metrics stay behind. A
    model card ``README.md`` is written from it. What was written by hand into an earlier card of ours is kept, and a
    ``README.md`` of another kind is left alone.

    Parameters
    ----------
    folder : Path
    loaded : Loaded
        From another folder or file than the one to write.
    config : EncoderConfig
        That of `loaded`, perhaps under another name.
    form : {"float32", "float16", "int8"}

    Raises
    ------
    DataError
        If it would overwrite what it is read from, or the weights do not fit the form.
    FormatError
        If the account of the training is damaged.
    """
    if loaded.path is not None and folder.exists() and folder.samefile(loaded.path):
        raise DataError(f"{folder}: this is the encoder itself; give a new folder")
    raw = read_raw_account(loaded.path) if loaded.account is not None and loaded.path is not None else None
    if raw is not None:
        _check_account(raw, config, where=f"{loaded.path}/{TRAINING_FILE}")
    # an account of the weights that lay here before would contradict those that come now
    (folder / TRAINING_FILE).unlink(missing_ok=True)
    write_weights(folder, config, loaded.weights, form)
    sha256 = loaded.sha256 if form == "float32" else weights_digest(read_weights(folder)[1])
    written = Written(sha256, (folder / WEIGHTS_FILE).stat().st_size)
    if raw is not None:
        account = _account(raw, loaded, config.name, form, written)
        _write_card(folder / CARD_FILE, account, config)
        write_whole(folder / TRAINING_FILE, msgspec.json.format(msgspec.json.encode(account), indent=2) + b"\n")
    return written


def _check_account(raw: dict[str, Any], config: EncoderConfig, *, where: str) -> None:
    """Refuse an account of which no card can be written, before anything is."""
    try:
        model_card(raw, config)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where}: {error}; get a fresh copy, or take it away") from error


def _account(raw: dict[str, Any], loaded: Loaded, name: str, form: WeightForm, written: Written) -> dict[str, Any]:
    before = raw.get("weights")
    first = before.get("original_sha256") if isinstance(before, dict) else None
    weights = {"form": form, "bytes": written.bytes, "original_sha256": first or loaded.sha256}
    corpus = raw.get("corpus")
    if isinstance(corpus, dict):
        raw = {**raw, "corpus": {key: _sources(value) for key, value in corpus.items()}}
    return {**raw, "encoder": name, "weights_sha256": written.sha256, "weights": weights}


def _sources(value: Any) -> Any:
    """Leave out when a file was last changed: that is of the machine, and its SHA-256 says which file it was."""
    if not isinstance(value, list):
        return value
    return [
        {key: fact for key, fact in each.items() if key != "changed_ns"} if isinstance(each, dict) else each
        for each in value
    ]


def _write_card(path: Path, account: dict[str, Any], config: EncoderConfig) -> None:
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if before is None or is_card(before):
        write_whole(path, model_card(account, config, before=before))
