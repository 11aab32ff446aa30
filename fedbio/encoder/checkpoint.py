"""Load an encoder from a built-in name, from our own folder, or from a fair-esm file, all by content."""

from __future__ import annotations

__all__ = ["load_encoder_weights", "read_fair_esm"]

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedbio.encoder.untrained import BUILT_IN, untrained_weights
from fedbio.errors import FormatError, SettingsError
from fedbio.weights import EncoderConfig, Weights, check_shapes, read_weights

_TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8
"""What fair-esm multiplies token embeddings by when a model was trained with token dropout and nothing is masked."""


def load_encoder_weights(encoder: str | os.PathLike[str], *, seed: int = 0) -> tuple[EncoderConfig, Weights]:
    """Load an architecture and its weights.

    Parameters
    ----------
    encoder : str or path-like
        A name of `fedbio.encoder.untrained.BUILT_IN`, an encoder folder, or a fair-esm ``.pt`` file.
    seed : int
        Of the random weights of a built-in architecture.

    Raises
    ------
    SettingsError
        If `encoder` is neither a known name nor a path.
    FormatError
        If the files are damaged or of an unknown kind.
    """
    built_in = BUILT_IN.get(str(encoder))
    if built_in is not None:
        return built_in, untrained_weights(built_in, seed)
    path = Path(encoder)
    if path.is_dir():
        return read_weights(path)
    if path.is_file():
        return read_fair_esm(path)
    raise SettingsError(
        f"encoder {str(encoder)!r}: neither a built-in name ({', '.join(BUILT_IN)}) nor an existing folder or file"
    )


def read_fair_esm(path: str | os.PathLike[str]) -> tuple[EncoderConfig, Weights]:
    """Read an ESM-2, ESM-1b or ESM-1v file of fair-esm; the contact-regression file beside it is not needed.

    Raises
    ------
    FormatError
        If the file is not such a checkpoint.
    """
    try:
        # fair-esm stores its arguments as a Namespace, which torch refuses by default since 2.6
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{path}: not a checkpoint that can be loaded safely ({why}); "
            "give a fair-esm ESM-2, ESM-1b or ESM-1v file, or an encoder folder"
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise FormatError(f"{path}: a torch file, but not a fair-esm checkpoint: it has no 'model' entry")
    name = Path(path).stem
    arch = getattr(content.get("args"), "arch", None)
    try:
        if "cfg" in content:
            config, state = _esm2(content, name)
        elif arch == "roberta_large":
            config, state = _esm1b(content, name)
        else:
            raise FormatError(f"{path}: a fair-esm file of architecture {arch!r}; ESM-2, ESM-1b and ESM-1v are read")
    except KeyError as error:
        raise FormatError(f"{path}: the checkpoint lacks {error}; was it written completely?") from error
    weights = _rename(state, config, str(path))
    check_shapes(weights, config, where=str(path))
    return config, weights


def _esm2(content: Mapping[str, Any], name: str) -> tuple[EncoderConfig, dict[str, torch.Tensor]]:
    model = content["cfg"]["model"]
    options = model if isinstance(model, Mapping) else vars(model)
    state = {re.sub(r"^encoder\.(sentence_encoder\.)?", "", key): value for key, value in content["model"].items()}
    config = EncoderConfig(
        name=name,
        layers=options["encoder_layers"],
        heads=options["encoder_attention_heads"],
        width=options["encoder_embed_dim"],
        ffn=4 * options["encoder_embed_dim"],
        vocabulary=state["embed_tokens.weight"].shape[0],
        max_tokens=1024,
        alphabet="esm",
        positions="rotary",
        activation="gelu",
        token_scale=_TOKEN_DROPOUT_SCALE if options.get("token_dropout") else 1.0,
    )
    return config, state


def _esm1b(content: Mapping[str, Any], name: str) -> tuple[EncoderConfig, dict[str, torch.Tensor]]:
    options = {key.removeprefix("encoder_"): value for key, value in vars(content["args"]).items()}
    state = {re.sub(r"^(encoder\.)?(sentence_encoder\.)?", "", key): value for key, value in content["model"].items()}
    # fair-esm counts positions from its padding number, 1: the first two rows belong to no token
    state["embed_positions.weight"] = state["embed_positions.weight"][2:]
    config = EncoderConfig(
        name=name,
        layers=options["layers"],
        heads=options["attention_heads"],
        width=options["embed_dim"],
        ffn=options["ffn_embed_dim"],
        vocabulary=state["embed_tokens.weight"].shape[0],
        max_tokens=state["embed_positions.weight"].shape[0],
        alphabet="esm",
        positions="learned",
        activation="gelu",
        token_scale=_TOKEN_DROPOUT_SCALE if options.get("token_dropout") else 1.0,
        embedding_norm=any(key.startswith("emb_layer_norm_before") for key in state),
    )
    return config, state


_NAMES = {
    "tokens": "embed_tokens",
    "positions": "embed_positions",
    "embedding_norm": "emb_layer_norm_before",
    "final_norm": "emb_layer_norm_after",
    "attention_norm": "self_attn_layer_norm",
    "out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
"""Our names of modules, and fair-esm's."""


def _rename(state: Mapping[str, torch.Tensor], config: EncoderConfig, where: str) -> Weights:
    """Bring fair-esm's tensors into our names, queries, keys and values joined into one."""

    def take(key: str) -> torch.Tensor:
        if key not in state:
            raise FormatError(f"{where}: tensor {key!r} is missing; was the file copied completely?")
        return state[key].float()

    keys = [("tokens", "weight"), ("final_norm", "weight"), ("final_norm", "bias")]
    if config.embedding_norm:
        keys += [("embedding_norm", "weight"), ("embedding_norm", "bias")]
    if config.positions == "learned":
        keys.append(("positions", "weight"))
    weights = {f"{module}.{part}": take(f"{_NAMES[module]}.{part}") for module, part in keys}
    for layer in range(config.layers):
        prefix = f"layers.{layer}"
        for part in ("weight", "bias"):
            for module in ("attention_norm", "out", "ffn_norm", "up", "down"):
                weights[f"{prefix}.{module}.{part}"] = take(f"{prefix}.{_NAMES[module]}.{part}")
            weights[f"{prefix}.qkv.{part}"] = torch.cat(
                [take(f"{prefix}.self_attn.{letter}_proj.{part}") for letter in "qkv"]
            )
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in weights.items()}
