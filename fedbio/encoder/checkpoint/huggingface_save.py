"""Write an encoder as a Hugging Face folder, so that ``AutoModel`` and ``AutoTokenizer`` load it."""

from __future__ import annotations

__all__ = ["write_huggingface"]

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fedbio.encoder.checkpoint.fair_esm import TOKEN_DROPOUT_SCALE
from fedbio.encoder.checkpoint.huggingface import MEGATRON_BERT, TANH_GELUS, esm_layout
from fedbio.encoder.checkpoint.layout import from_ours
from fedbio.errors import DataError
from fedbio.files import whole_file, write_whole
from fedbio.vocabularies import VOCABULARIES, VOCABULARY_FILE
from fedbio.weights import CONFIG_FILE, WEIGHTS_FILE, EncoderConfig, Weights


def write_huggingface(folder: str | os.PathLike[str], config: EncoderConfig, weights: Weights) -> bool:
    """Write configuration, weights and tokenizer; each file appears whole, the configuration last.

    With the exact GELU it becomes an EsmForMaskedLM, or without a language-model head an EsmModel. EsmModel has no
    other GELU; with the tanh approximation, as in ESM-1nv, it becomes a MegatronBertModel.

    Parameters
    ----------
    folder : path-like
    config, weights
        As `fedbio.encoder.checkpoint.read_encoder` gives them.

    Returns
    -------
    bool
        Whether the language-model head is in it. MegatronBert would compute the one of ESM-1nv with another GELU, so
        that it is left out there.

    Raises
    ------
    DataError
        If no model of Hugging Face computes this architecture.
    """
    target = Path(folder)
    if config.activation == "gelu" and config.token_scale in (1.0, TOKEN_DROPOUT_SCALE):
        settings, tensors = _esm(config, weights)
    elif config.positions == "learned" and config.token_scale == 1.0 and not config.embedding_norm:
        settings, tensors = _megatron_bert(config, weights)
    else:
        raise DataError(
            f"{config.name}: no model of Hugging Face computes {config.activation} with {config.positions} positions "
            f"and a token scale of {config.token_scale:g}; keep it in fedbio's own form"
        )
    known = VOCABULARIES[config.alphabet]
    settings |= {
        "_name_or_path": config.name,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "fedbio_trained": config.trained,
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": known.pieces.index(known.padding),
        "tie_word_embeddings": True,
        "vocab_size": config.vocabulary,
    }
    tokenizer = {
        "cls_token": known.start,
        "eos_token": known.end,
        "mask_token": known.mask,
        "model_max_length": config.max_tokens,
        "pad_token": known.padding,
        "tokenizer_class": "EsmTokenizer",
        "unk_token": known.unknown,
    }
    write_whole(target / VOCABULARY_FILE, known.text)
    with whole_file(target / WEIGHTS_FILE) as beside:
        # transformers refuses a file that does not say which framework its tensors are of
        save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, beside, {"format": "pt"})
        # safetensors lets nobody else read its files; a cache of encoders is shared
        shutil.copymode(target / VOCABULARY_FILE, beside)
    write_whole(target / "tokenizer_config.json", json.dumps(tokenizer, indent=2) + "\n")
    write_whole(target / CONFIG_FILE, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return "lm_head.bias" in tensors


def _esm(config: EncoderConfig, weights: Weights) -> tuple[dict[str, Any], Weights]:
    layout, known = esm_layout(config), VOCABULARIES[config.alphabet]
    tensors = from_ours(weights, config, layout)
    head = layout.head_bias in tensors
    if head:
        tensors = {name if name.startswith("lm_head.") else f"esm.{name}": each for name, each in tensors.items()}
    settings = {
        "architectures": ["EsmForMaskedLM" if head else "EsmModel"],
        "emb_layer_norm_before": config.embedding_norm,
        "hidden_act": "gelu",
        "is_folding_model": False,
        "mask_token_id": known.pieces.index(known.mask),
        "max_position_embeddings": config.max_tokens + layout.first_position,
        "model_type": "esm",
        "position_embedding_type": "rotary" if config.positions == "rotary" else "absolute",
        "token_dropout": config.token_scale != 1.0,
    }
    return settings, tensors


def _megatron_bert(config: EncoderConfig, weights: Weights) -> tuple[dict[str, Any], Weights]:
    tensors = from_ours(weights, config, MEGATRON_BERT)
    # one protein is one segment; the type of Megatron's first segment adds nothing
    tensors["embeddings.token_type_embeddings.weight"] = np.zeros((1, config.width), np.float32)
    settings = {
        "architectures": ["MegatronBertModel"],
        "hidden_act": TANH_GELUS[0] if config.activation == "gelu_tanh" else "gelu",
        "max_position_embeddings": config.max_tokens,
        "model_type": "megatron-bert",
        "type_vocab_size": 1,
    }
    return settings, tensors
