"""Know an encoder by its files alone, without torch: its configuration, its weights and their digest.

Weights are float32 here, whatever their file holds (`fedbio.weights_file`).
"""

from __future__ import annotations

__all__ = [
    "CONFIG_FILE",
    "ESM1NV",
    "WEIGHTS_FILE",
    "EncoderConfig",
    "Weights",
    "check_shapes",
    "head_shapes",
    "inference_shapes",
    "read_config",
    "read_weights",
    "weights_digest",
    "write_weights",
]

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError, FormatError
from fedbio.files import whole_file, write_whole
from fedbio.vocabularies import VOCABULARIES, VOCABULARY_FILE, check_vocabulary, read_pieces
from fedbio.weights_file import Manifest, WeightForm, read_tensors, write_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20

Weights = dict[str, NDArray[np.float32]]
_STORED: tuple[np.dtype[Any], ...] = (np.dtype("<f4"), np.dtype("<f2"))
# the upper ends are far beyond any encoder of proteins; they keep a hostile configuration from filling the memory
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Heads = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Rows = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The architecture of an encoder; the defaults are ESM-1nv's.

    Parameters
    ----------
    name : str
        What reports and embeddings files call it.
    trained : bool
        False if the weights are random numbers from a seed.
    layers, heads, width, ffn : int
        Transformer layers, attention heads, embedding width D, and width of the feed-forward network.
    vocabulary : int
        Rows of the token table; ESM-1nv pads its 30 pieces to 128.
    max_tokens : int
        Longest input with start and end token; two less is the longest protein in residues.
    alphabet : str
        ``"esm1nv"`` (SentencePiece of BioNeMo) or ``"esm"`` (fair-esm's 33 tokens).
    positions : str
        ``"learned"``: a table of `max_tokens` rows; ``"rotary"``: queries and keys are turned by their position.
    activation : str
        ``"gelu_tanh"`` (Megatron's fused form) or ``"gelu"`` (by the error function) in the feed-forward network.
    token_scale : float
        Factor on token embeddings: 1 - 0.15 * 0.8 for fair-esm models trained with token dropout, else 1.
    embedding_norm : bool
        Whether a layer norm follows the embedding (ESM-1b).
    """

    format: Literal["fedbio-encoder"] = "fedbio-encoder"
    version: Literal[1] = 1
    name: str = "esm1nv-44m"
    trained: bool = True
    layers: _Layers = 6
    heads: _Heads = 12
    width: _Width = 768
    ffn: _Rows = 3072
    vocabulary: _Rows = 128
    max_tokens: Annotated[int, msgspec.Meta(ge=3, le=1 << 20)] = 512
    alphabet: Literal["esm1nv", "esm"] = "esm1nv"
    positions: Literal["learned", "rotary"] = "learned"
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    token_scale: float = 1.0
    embedding_norm: bool = False

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of twice the number of heads, {self.heads}")
        if self.vocabulary < len(VOCABULARIES[self.alphabet].pieces):
            raise ValueError(f"a token table of {self.vocabulary} rows is too small for the alphabet {self.alphabet!r}")

    @property
    def max_residues(self) -> int:
        """The longest protein that is taken whole, in residues."""
        return self.max_tokens - 2


ESM1NV = EncoderConfig(trained=False)
"""ESM-1nv as BioNeMo 1.10 published it: 43,612,544 parameters with its language-model head."""


def inference_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that inference uses (all but the language-model head), sorted by name."""
    width, ffn = config.width, config.ffn
    shapes: dict[str, tuple[int, ...]] = {"tokens.weight": (config.vocabulary, width)}
    if config.positions == "learned":
        shapes["positions.weight"] = (config.max_tokens, width)
    norms = ["final_norm"] + ["embedding_norm"] * config.embedding_norm
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(config.layers):
        prefix = f"layers.{layer}"
        norms += [f"{prefix}.attention_norm", f"{prefix}.ffn_norm"]
        linears |= {
            f"{prefix}.qkv": (3 * width, width),
            f"{prefix}.out": (width, width),
            f"{prefix}.up": (ffn, width),
            f"{prefix}.down": (width, ffn),
        }
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return dict(sorted(shapes.items()))


def head_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the language-model head, sorted by name; it shares the token table."""
    width = config.width
    return {
        "lm_head.bias": (config.vocabulary,),
        "lm_head.dense.bias": (width,),
        "lm_head.dense.weight": (width, width),
        "lm_head.norm.bias": (width,),
        "lm_head.norm.weight": (width,),
    }


def weights_digest(weights: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of the weights that inference uses, as 64 hexadecimal digits.

    Notes
    -----
    The digest is that of the safetensors file which holds exactly these float32 tensors, sorted by name and without
    metadata; a language-model head beside them does not count. ``sha256sum model.safetensors`` gives the same
    for a folder without a head whose weights are kept as float32. Kept as float16 or int8, they are widened before
    they are digested: an encoder that was rounded is another one, but has one digest whatever file holds it.
    """
    names = sorted(name for name in weights if not name.startswith("lm_head."))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        begin, end = end, end + weights[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for name in names:
        digest.update(np.ascontiguousarray(weights[name], dtype="<f4").data)
    return digest.hexdigest()


def read_config(folder: str | os.PathLike[str]) -> EncoderConfig:
    """Read the architecture of an encoder folder.

    Raises
    ------
    FormatError
        If there is no readable ``config.json``; the message names the key.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FormatError(f"{path}: not found; an encoder folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise FormatError(f"{path}: larger than the {_MAX_CONFIG_BYTES:,} bytes that a configuration may have")
    try:
        return msgspec.json.decode(path.read_bytes(), type=EncoderConfig)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a configuration that this release can read: {error}") from error


def read_weights(folder: str | os.PathLike[str]) -> tuple[EncoderConfig, Weights]:
    """Read an encoder folder: its architecture, and all tensors of its weights file, checked against each other.

    A folder of an older release has no ``vocab.txt``; where there is one, it must be that of the alphabet.

    Raises
    ------
    FormatError
        If a file is missing or damaged, or a tensor is missing, of another shape, of another dtype, or not finite.
    """
    config = read_config(folder)
    vocabulary = Path(folder) / VOCABULARY_FILE
    if vocabulary.is_file():
        found = check_vocabulary(read_pieces(vocabulary), where=str(vocabulary))
        if found != config.alphabet:
            raise FormatError(
                f"{vocabulary}: the tokens of {found!r}, but {CONFIG_FILE} says {config.alphabet!r}; "
                "get the folder again, the two files are not of one encoder"
            )
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise FormatError(f"{path}: not found; an encoder folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    return config, read_tensors(path, lambda found: _check(found, config, where=str(path), dtypes=_STORED))


def check_shapes(weights: Mapping[str, NDArray[Any]], config: EncoderConfig, *, where: str) -> None:
    """Refuse weights that do not fit the architecture.

    Raises
    ------
    FormatError
        Naming the first tensor that is missing, unknown, of another shape or not float32.
    """
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    _check(found, config, where=where, dtypes=_STORED[:1])


def _check(found: Manifest, config: EncoderConfig, *, where: str, dtypes: tuple[np.dtype[Any], ...]) -> None:
    expected = inference_shapes(config)
    if any(name.startswith("lm_head.") for name in found):
        expected |= head_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{where}: tensor {name!r} is missing; {config.name} needs it with shape {list(shape)}")
        found_shape, dtype = found[name]
        if found_shape != shape or dtype not in dtypes:
            raise FormatError(
                f"{where}: tensor {name!r}: expected {' or '.join(map(str, dtypes))} of shape {list(shape)}, "
                f"found {dtype} of shape {list(found_shape)}"
            )
    for name in found:
        if name not in expected:
            raise FormatError(f"{where}: tensor {name!r} is not part of {config.name}")


def write_weights(
    folder: str | os.PathLike[str], config: EncoderConfig, weights: Weights, form: WeightForm = "float32"
) -> None:
    """Write an encoder folder that `read_weights` reads; each of its files appears whole.

    Besides weights and architecture the folder gets ``vocab.txt``, so that another tool knows what the rows of the
    token table stand for.

    Parameters
    ----------
    folder : path-like
    config : EncoderConfig
    weights : dict of str to ndarray, float32
    form : {"float32", "float16", "int8"}
        As what the matrices are kept, see `fedbio.weights_file`; the narrower ones round.

    Raises
    ------
    DataError
        If the weights do not fit the architecture, or a value does not fit the form.
    """
    target = Path(folder)
    try:
        check_shapes(weights, config, where=str(target))
    except FormatError as error:
        raise DataError(str(error)) from error
    write_whole(target / VOCABULARY_FILE, VOCABULARIES[config.alphabet].text)
    with whole_file(target / WEIGHTS_FILE) as beside:
        try:
            write_tensors(beside, weights, form)
        except FormatError as error:
            raise DataError(f"{target / WEIGHTS_FILE}: {error}") from error
    write_whole(target / CONFIG_FILE, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
