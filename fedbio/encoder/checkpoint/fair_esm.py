"""Read ESM-2, ESM-1b and ESM-1v as fair-esm distributes them, told by content and not by the file's name."""

from __future__ import annotations

__all__ = ["TOKEN_DROPOUT_SCALE", "read_fair_esm"]

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbio.encoder.checkpoint.layout import Layout, to_ours
from fedbio.encoder.checkpoint.pytorch import load_pytorch
from fedbio.encoder.checkpoint.state import State, make_config
from fedbio.errors import FormatError
from fedbio.weights import EncoderConfig, Weights

TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8
"""What fair-esm multiplies token embeddings by when a model was trained with token dropout and nothing is masked."""

_LAYOUT = Layout(
    tokens="embed_tokens",
    positions="embed_positions",
    embedding_norm="emb_layer_norm_before",
    final_norm="emb_layer_norm_after",
    layer="layers",
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    ffn_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    first_position=2,  # fair-esm counts positions from its padding number, 1, and on
    head_dense="lm_head.dense",
    head_norm="lm_head.layer_norm",
    head_bias="lm_head.bias",
    head_tied="lm_head.weight",
)

_PASSED_OVER = r"contact_head\.|layers\.\d+\.self_attn\.rot_emb\.inv_freq$"


def read_fair_esm(path: str | os.PathLike[str]) -> tuple[EncoderConfig, Weights]:
    """Read an ESM-2, ESM-1b or ESM-1v file of fair-esm; the contact-regression file beside it is not needed.

    Raises
    ------
    FormatError
        If the file is not such a checkpoint.
    """
    where = str(path)
    content = load_pytorch(path, where=where)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise FormatError(
            f"{where}: a torch file, but not a fair-esm checkpoint: it has no 'model' entry; "
            "of Hugging Face's pytorch_model.bin give the folder"
        )
    arch = getattr(content.get("args"), "arch", None)
    try:
        if "cfg" in content:
            options, prefix, positions = _options(content["cfg"]["model"]), r"^encoder\.(sentence_encoder\.)?", "rotary"
        elif arch == "roberta_large":
            options, prefix, positions = _options(content["args"]), r"^(encoder\.)?(sentence_encoder\.)?", "learned"
        else:
            raise FormatError(f"{where}: a fair-esm file of architecture {arch!r}; ESM-2, ESM-1b and ESM-1v are read")
        state = State({re.sub(prefix, "", str(key)): value for key, value in content["model"].items()}, where)
        width = options["embed_dim"]
        config = make_config(
            where,
            name=Path(path).stem,
            layers=options["layers"],
            heads=options["attention_heads"],
            width=width,
            # ESM-2 files do not say it; the network of fair-esm has it four times as wide
            ffn=4 * width if positions == "rotary" else options["ffn_embed_dim"],
            vocabulary=state.rows("embed_tokens.weight"),
            max_tokens=1024 if positions == "rotary" else state.rows("embed_positions.weight") - _LAYOUT.first_position,
            alphabet="esm",
            positions=positions,
            activation="gelu",
            token_scale=TOKEN_DROPOUT_SCALE if options.get("token_dropout") else 1.0,
            embedding_norm=positions == "learned" and "emb_layer_norm_before.weight" in state,
        )
    except (KeyError, TypeError) as error:
        raise FormatError(f"{where}: the checkpoint lacks {error}; was it written completely?") from error
    weights = to_ours(state, config, _LAYOUT)
    state.finish(_PASSED_OVER)
    return config, weights


def _options(model: Any) -> dict[str, Any]:
    """Return what a model was made with; `encoder_` before a name is left out."""
    options = model if isinstance(model, Mapping) else vars(model)
    return {str(key).removeprefix("encoder_"): value for key, value in options.items()}
