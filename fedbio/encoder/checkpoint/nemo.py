"""Read ESM-1nv from a BioNeMo 1.x ``.nemo`` archive.

The layout is that of Megatron BERT in NeMo [1]_ with the settings of ESM-1nv [2]_: a tar with ``model_config.yaml`` and
``model_weights.ckpt``, in which the rows of the joint query, key and value map are sorted by heads.

References
----------
.. [1] NVIDIA NeMo 1.x, nemo/collections/nlp/models/language_modeling/megatron/bert_model.py
.. [2] BioNeMo Framework 1.10, examples/protein/esm1nv/conf/base_config.yaml
"""

from __future__ import annotations

__all__ = ["read_nemo"]

import re
import reprlib
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fedbio.encoder.checkpoint.archive import unpack_members
from fedbio.encoder.checkpoint.layout import Layout, to_ours
from fedbio.encoder.checkpoint.pytorch import load_pytorch
from fedbio.encoder.checkpoint.sentencepiece import model_pieces
from fedbio.encoder.checkpoint.state import State, make_config
from fedbio.errors import FormatError
from fedbio.vocabularies import check_vocabulary, read_pieces
from fedbio.weights import EncoderConfig, Weights

_CONFIG, _WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_MAX_CONFIG_BYTES = 256 << 10
_MAX_TOKENIZER_BYTES = 4 << 20
_MAX_WEIGHTS_BYTES = 64 << 30

_LAYOUT = Layout(
    tokens="language_model.embedding.word_embeddings",
    positions="language_model.embedding.position_embeddings",
    final_norm="language_model.encoder.final_layernorm",
    layer="language_model.encoder.layers",
    attention_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    out="self_attention.dense",
    ffn_norm="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    head_dense="lm_head.dense",
    head_norm="lm_head.layernorm",
    head_bias="lm_head.bias",
)

_PREFIX = re.compile(r"^(model\.)?(module\.)?(?=language_model\.|lm_head\.)")
"""Mixed precision (``megatron_amp_O2``) wraps the model once more."""

_PASSED_OVER = r".*\._extra_state$|(model\.)?(module\.)?(binary_head|language_model\.pooler)\."

_EXPECTED: dict[str, tuple[Any, Any]] = {
    # setting: (what it is if it is not named, what fedbio computes with)
    "megatron_legacy": (False, False),
    "position_embedding_type": ("learned_absolute", "learned_absolute"),
    "transformer_block_type": ("pre_ln", "pre_ln"),
    "normalization": ("layernorm", "layernorm"),
    "activation": ("gelu", "gelu"),
    "openai_gelu": (False, False),
    "bias": (True, True),
    "embedding_token_dropout": (False, False),
    "tensor_model_parallel_size": (1, 1),
    "pipeline_model_parallel_size": (1, 1),
}


def read_nemo(path: Path) -> tuple[EncoderConfig, Weights]:
    """Read an archive's architecture and weights, the language-model head included.

    Raises
    ------
    FormatError
        If the archive is damaged or hostile, or holds another model than ESM-1nv.
    """
    where = str(path)
    with tempfile.TemporaryDirectory(prefix="fedbio-nemo-") as folder:
        config_path, weights_path = Path(folder) / "config", Path(folder) / "weights"
        found = unpack_members(
            path, {_CONFIG: (config_path, _MAX_CONFIG_BYTES), _WEIGHTS: (weights_path, _MAX_WEIGHTS_BYTES)}
        )
        if absent := {_CONFIG, _WEIGHTS} - found:
            raise FormatError(
                f"{where}: no {' and no '.join(sorted(absent))} in the archive; archives of BioNeMo 1.x are read"
            )
        settings = _settings(config_path, f"{where}: {_CONFIG}")
        _check_tokenizer(path, settings, Path(folder))
        content = load_pytorch(weights_path, where=f"{where}: {_WEIGHTS}")
        if not isinstance(content, dict):
            raise FormatError(f"{where}: {_WEIGHTS}: holds no named tensors; get a fresh copy")
        state = State({_PREFIX.sub("", str(name)): value for name, value in content.items()}, f"{where}: {_WEIGHTS}")
        config = _architecture(settings, state, path)
        weights = to_ours(state, config, _LAYOUT)
        state.finish(_PASSED_OVER)
    return config, weights


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases: with these a few lines can stand for more than memory holds, and NeMo writes none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _settings(path: Path, where: str) -> dict[str, Any]:
    """Return the settings of the model, once none of them asks for what our network does not compute."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506 (is a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{where}: not valid YAML ({str(error).splitlines()[0]}); get a fresh copy") from error
    # the configuration of a whole run has the model's as a part of it
    if isinstance(settings, dict) and isinstance(settings.get("model"), dict):
        settings = settings["model"]
    if not isinstance(settings, dict):
        raise FormatError(f"{where}: holds no settings; get a fresh copy")
    for name, (default, expected) in _EXPECTED.items():
        value = settings.get(name, default)
        if value != expected:
            remedy = {
                "megatron_legacy": "its rows of queries, keys and values are sorted in another way; "
                "save it again with a newer NeMo",
                "position_embedding_type": "ESM-2nv is read from its origin, fair-esm or Hugging Face",
                "tensor_model_parallel_size": "merge the parts with NeMo first",
                "pipeline_model_parallel_size": "merge the parts with NeMo first",
            }.get(name, "archives of ESM-1nv are read")
            raise FormatError(f"{where}: {name} is {reprlib.repr(value)}, and fedbio reads {expected!r} only; {remedy}")
    return settings


def _check_tokenizer(path: Path, settings: dict[str, Any], folder: Path) -> None:
    """Refuse another vocabulary than ESM-1nv's, as far as the archive holds the files that its settings name.

    NeMo writes ``nemo:`` before the name of a file that is in the archive.
    """
    tokenizer = settings.get("tokenizer")
    if not isinstance(tokenizer, dict):
        return
    named = {str(tokenizer.get(key, "")) for key in ("model", "vocab_file")}
    names = {name.removeprefix("nemo:").removeprefix("./") for name in named if name.startswith("nemo:")}
    wanted = {name: (folder / f"tokenizer-{n}", _MAX_TOKENIZER_BYTES) for n, name in enumerate(sorted(names))}
    for name in sorted(unpack_members(path, wanted)) if wanted else ():
        where, file = f"{path}: {name}", wanted[name][0]
        if name.endswith(".model"):
            pieces = model_pieces(file.read_bytes(), where=where)
        elif name.endswith(".vocab"):
            pieces = read_pieces(file, where=where)
        else:
            continue
        if check_vocabulary(pieces, where=where) != "esm1nv":
            raise FormatError(f"{where}: not the vocabulary of ESM-1nv; archives of ESM-1nv are read")


def _architecture(settings: dict[str, Any], state: State, path: Path) -> EncoderConfig:
    where = f"{path}: {_CONFIG}"

    def number(name: str) -> Any:
        if name not in settings:
            raise FormatError(f"{where}: {name} is missing; get a fresh copy")
        return settings[name]

    try:
        epsilon = float(settings.get("layernorm_epsilon", 1e-5))  # YAML 1.1 takes 1e-5 for a word
    except (TypeError, ValueError):
        epsilon = float("nan")
    if epsilon != 1e-5:
        raise FormatError(
            f"{where}: layernorm_epsilon is {settings['layernorm_epsilon']!r}; fedbio computes with 1e-05 only"
        )
    rows = state.rows(f"{_LAYOUT.positions}.weight")
    # the number may stand there as a reference to another one: ${.seq_length}
    said = settings.get("max_position_embeddings")
    if isinstance(said, int) and said != rows:
        raise FormatError(
            f"{where}: max_position_embeddings is {said}, but the table in {_WEIGHTS} has {rows} rows; "
            "the two are not of one encoder"
        )
    width, heads = number("hidden_size"), number("num_attention_heads")
    channels = settings.get("kv_channels")
    if isinstance(channels, int) and isinstance(width, int) and isinstance(heads, int) and channels * heads != width:
        raise FormatError(f"{where}: kv_channels is {channels}; fedbio computes with hidden_size / heads only")
    # without the fused kernel, or with ESM's own GELU, Megatron computes the error function
    fused = settings.get("bias_gelu_fusion", True) and settings.get("bias_activation_fusion", True)
    return make_config(
        where,
        name=path.stem,
        layers=number("num_layers"),
        heads=heads,
        width=width,
        ffn=number("ffn_hidden_size"),
        vocabulary=state.rows(f"{_LAYOUT.tokens}.weight"),
        max_tokens=rows,
        alphabet="esm1nv",
        positions="learned",
        activation="gelu_tanh" if fused and not settings.get("esm_gelu", False) else "gelu",
    )
