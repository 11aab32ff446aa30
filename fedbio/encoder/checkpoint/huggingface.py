"""Read a Hugging Face folder: EsmModel and its kin, and MegatronBert with the vocabulary of ESM-1nv."""

from __future__ import annotations

__all__ = ["ESM", "MEGATRON_BERT", "TANH_GELUS", "read_huggingface"]

import dataclasses
import re
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedbio.encoder.checkpoint.fair_esm import TOKEN_DROPOUT_SCALE
from fedbio.encoder.checkpoint.layout import Layout, to_ours
from fedbio.encoder.checkpoint.pytorch import load_pytorch
from fedbio.encoder.checkpoint.state import State, make_config
from fedbio.encoder_files import EncoderFolder
from fedbio.errors import FormatError
from fedbio.vocabularies import VOCABULARIES, VOCABULARY_FILE, check_vocabulary, read_pieces
from fedbio.weights import CONFIG_FILE, EncoderConfig, Weights

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""What Hugging Face calls GELU in the tanh approximation."""

ESM = Layout(
    tokens="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    embedding_norm="embeddings.layer_norm",
    final_norm="encoder.emb_layer_norm_after",
    layer="encoder.layer",
    attention_norm="attention.LayerNorm",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    ffn_norm="LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    head_dense="lm_head.dense",
    head_norm="lm_head.layer_norm",
    head_bias="lm_head.bias",
    head_tied="lm_head.decoder.weight",
)
"""EsmModel; its `first_position` follows from the padding number."""

MEGATRON_BERT = Layout(
    tokens="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    final_norm="encoder.ln",
    layer="encoder.layer",
    attention_norm="attention.ln",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    ffn_norm="ln",
    up="intermediate.dense",
    down="output.dense",
)
"""MegatronBertModel, without its head, whose GELU is that of the layers; the head of ESM-1nv takes the exact one."""

_TASKS = r"(?!embeddings\.|encoder\.|lm_head\.)|lm_head\.decoder\."
"""Heads of other tasks, a pooler and the like: beside the trunk, and without a part in hidden states."""
_BUFFERS = r"embeddings\.position_ids$|encoder\.layer\.(\d+|\*)\.attention\.self\.rotary_embeddings\.inv_freq$"
_ROTARY_LEFTOVER = r"embeddings\.position_embeddings\.weight$"
"""Files of the first ESM-2 conversions hold a table that rotary positions never use."""


def read_huggingface(folder: EncoderFolder) -> tuple[EncoderConfig, Weights]:
    """Read the architecture from ``config.json`` and the weights from safetensors or, with nothing run, pickles.

    Raises
    ------
    FormatError
        If it is of another model, needs what our network does not have, or files are damaged or do not fit.
    """
    readers = {"esm": _esm, "megatron-bert": _megatron_bert}
    where = str(folder.path / CONFIG_FILE)
    kind = folder.config["model_type"]
    if kind not in readers:
        raise FormatError(
            f"{where}: model_type {kind!r}; of Hugging Face 'esm' (ESM-2, ESM-1b, ESM-1v) and 'megatron-bert' "
            "(what fedbio makes of ESM-1nv) are read"
        )
    settings = _Settings(folder.config, where)
    settings.must("layer_norm_eps", 1e-5, default=1e-12)
    for name in ("quantization_config", "is_folding_model", "is_decoder", "add_cross_attention"):
        if folder.config.get(name):
            raise FormatError(f"{where}: {name} is set; give a plain encoder")
    tensors = {_plain(name): tensor for path in folder.weights for name, tensor in _load(path).items()}
    files = str(folder.weights[0]) if len(folder.weights) == 1 else str(folder.path)
    return readers[kind](folder, settings, State(tensors, files))


class _Settings:
    """Numbers and words of a ``config.json``, each named if it is missing or not supported."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._config:
            raise FormatError(f"{self.where}: {name} is missing; get a fresh copy")
        return self._config[name]

    def get(self, name: str, default: Any) -> Any:
        return self._config.get(name, default)

    def must(self, name: str, value: Any, *, default: Any) -> None:
        """Refuse another value than the one that fedbio computes with; `default` is Hugging Face's own."""
        found = self.get(name, default)
        if found != value:
            raise FormatError(f"{self.where}: {name} is {found!r}; fedbio computes with {value!r} only")

    def common(self, folder: EncoderFolder) -> dict[str, Any]:
        """Return the fields that both models name alike."""
        named = self.get("_name_or_path", "")
        return {
            "name": (PurePath(named).name if isinstance(named, str) else "") or folder.path.absolute().name,
            "trained": self.get("fedbio_trained", True),
            "layers": self["num_hidden_layers"],
            "heads": self["num_attention_heads"],
            "width": self["hidden_size"],
            "ffn": self["intermediate_size"],
            "vocabulary": self["vocab_size"],
        }


def _esm(folder: EncoderFolder, settings: _Settings, state: State) -> tuple[EncoderConfig, Weights]:
    alphabet = _alphabet(folder, settings)
    known = VOCABULARIES[alphabet]
    padding = known.pieces.index(known.padding)
    settings.must("pad_token_id", padding, default=None)
    rotary = settings.get("position_embedding_type", "absolute") == "rotary"
    if not rotary:
        settings.must("position_embedding_type", "absolute", default="absolute")
    ropes = settings.get("rope_parameters", None)
    theta = ropes.get("rope_theta", 1e4) if isinstance(ropes, dict) else settings.get("rope_theta", 1e4)
    if theta != 1e4:
        raise FormatError(f"{settings.where}: rope_theta is {theta!r}; fedbio computes with 10000 only")
    rows = settings["max_position_embeddings"]
    config = make_config(
        settings.where,
        **settings.common(folder),
        # EsmModel counts positions from its padding number on; its layers compute the exact GELU whatever
        # hidden_act says
        max_tokens=rows - padding - 1 if isinstance(rows, int) else rows,
        alphabet=alphabet,
        positions="rotary" if rotary else "learned",
        activation="gelu",
        token_scale=TOKEN_DROPOUT_SCALE if settings.get("token_dropout", False) else 1.0,
        embedding_norm=bool(settings.get("emb_layer_norm_before", False)),
    )
    weights = to_ours(state, config, esm_layout(config))
    state.finish("|".join([_TASKS, _BUFFERS, *([_ROTARY_LEFTOVER] if rotary else [])]))
    return config, weights


def esm_layout(config: EncoderConfig) -> Layout:
    """Return how EsmModel arranges an architecture: positions begin behind the padding number."""
    known = VOCABULARIES[config.alphabet]
    return dataclasses.replace(ESM, first_position=known.pieces.index(known.padding) + 1)


def _megatron_bert(folder: EncoderFolder, settings: _Settings, state: State) -> tuple[EncoderConfig, Weights]:
    alphabet = _alphabet(folder, settings)
    activation = settings.get("hidden_act", "gelu")
    if activation not in ("gelu", *TANH_GELUS):
        raise FormatError(f"{settings.where}: hidden_act is {activation!r}; fedbio computes with GELU only")
    config = make_config(
        settings.where,
        **settings.common(folder),
        max_tokens=settings["max_position_embeddings"],
        alphabet=alphabet,
        positions="learned",
        activation="gelu" if activation == "gelu" else "gelu_tanh",
    )
    weights = to_ours(state, config, MEGATRON_BERT)
    types = (settings.get("type_vocab_size", 2), config.width)
    # one protein is one segment, number 0: its vector is part of every position's
    weights["positions.weight"] += state.take("embeddings.token_type_embeddings.weight", types)[0]
    state.finish(f"{_TASKS}|{_BUFFERS}")
    return config, weights


def _alphabet(folder: EncoderFolder, settings: _Settings) -> str:
    path = folder.path / VOCABULARY_FILE
    if path.is_file():
        return check_vocabulary(read_pieces(path), where=str(path))
    listed = settings.get("vocab_list", None)
    if isinstance(listed, list):
        return check_vocabulary(tuple(map(str, listed)), where=f"{settings.where}: vocab_list")
    if folder.config["model_type"] == "esm" and settings["vocab_size"] == len(VOCABULARIES["esm"].pieces):
        return "esm"
    raise FormatError(
        f"{path}: not found; without it nobody knows which rows of the token table stand for which residue"
    )


def _plain(name: str) -> str:
    """Leave out the name of the trunk, which models with a head write before its tensors, and old names of norms.

    transformers 5 still writes an EsmModel's norms as ``gamma`` and ``beta``.
    """
    name = re.sub(r"^(esm|bert)\.", "", name)
    return re.sub(r"(?<=\.LayerNorm\.)(gamma|beta)$", lambda old: {"gamma": "weight", "beta": "bias"}[old[0]], name)


def _load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        content = load_pytorch(path, where=str(path))
        if not isinstance(content, dict):
            raise FormatError(f"{path}: a torch file without named tensors; get a fresh copy")
        return {str(name): tensor for name, tensor in content.items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, TypeError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
