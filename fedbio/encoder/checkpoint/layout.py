"""How a checkpoint of another tool names and arranges the tensors of one architecture, in both directions."""

from __future__ import annotations

__all__ = ["Layout", "from_ours", "to_ours"]

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbio.encoder.checkpoint.state import State
from fedbio.weights import EncoderConfig, Weights, check_shapes

log = logging.getLogger(__name__)

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Another tool's names of our modules; those from `attention_norm` on follow `layer` and its number.

    Parameters
    ----------
    qkv : tuple of str
        Queries, keys and values as three linear maps; or one name, and the rows of each head are together: its
        queries, then its keys, then its values (Megatron).
    first_position : int
        Row of the position table that belongs to the first token.
    head_dense, head_norm, head_bias, head_tied : str
        The language-model head: a linear map, a norm, the name of the bias, and the copy of the token table that some
        files hold.
    """

    tokens: str
    positions: str
    embedding_norm: str = ""
    final_norm: str
    layer: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    ffn_norm: str
    up: str
    down: str
    first_position: int = 0
    head_dense: str = ""
    head_norm: str = ""
    head_bias: str = ""
    head_tied: str = ""

    def modules(self, config: EncoderConfig) -> dict[str, str]:
        """Their names of the norms and linear maps that are arranged as ours are, by our names."""
        names = {"final_norm": self.final_norm}
        if config.embedding_norm:
            names["embedding_norm"] = self.embedding_norm
        for number in range(config.layers):
            for ours in ("attention_norm", "out", "ffn_norm", "up", "down"):
                names[f"layers.{number}.{ours}"] = f"{self.layer}.{number}.{getattr(self, ours)}"
        return names

    def projections(self, number: int) -> list[str]:
        """Their names of the maps to queries, keys and values in a layer."""
        return [f"{self.layer}.{number}.{part}" for part in self.qkv]


def to_ours(state: State, config: EncoderConfig, layout: Layout) -> Weights:
    """Bring a checkpoint's tensors into our names and arrangement, with the language-model head if it has one.

    Raises
    ------
    FormatError
        If a tensor is missing or does not fit the architecture.
    """
    width, ffn = config.width, config.ffn
    weights: Weights = {"tokens.weight": state.take(f"{layout.tokens}.weight", (config.vocabulary, width))}
    if config.positions == "learned":
        rows = layout.first_position + config.max_tokens
        weights["positions.weight"] = state.take(f"{layout.positions}.weight", (rows, width))[layout.first_position :]
    shapes = {"up": (ffn, width), "down": (width, ffn), "out": (width, width)}
    for ours, theirs in layout.modules(config).items():
        shape = shapes.get(ours.rpartition(".")[2], (width,))
        weights[f"{ours}.weight"] = state.take(f"{theirs}.weight", shape)
        weights[f"{ours}.bias"] = state.take(f"{theirs}.bias", shape[:1])
    parts = len(layout.qkv)
    for number in range(config.layers):
        for part, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            joined = np.empty(shape, np.float32)
            for name, third in zip(layout.projections(number), np.split(joined, parts), strict=True):
                state.take(f"{name}.{part}", third.shape, into=third)
            weights[f"layers.{number}.qkv.{part}"] = _sorted_by_use(joined, config.heads) if parts == 1 else joined
    weights |= _head(state, config, layout)
    weights = {name: np.ascontiguousarray(tensor) for name, tensor in weights.items()}
    check_shapes(weights, config, where=state.where)
    return weights


def _sorted_by_use(rows: Array, heads: int) -> Array:
    """All queries, then all keys, then all values, from rows that are sorted by heads, (3D, ...) -> (3D, ...)."""
    by_head = rows.reshape(heads, 3, -1, *rows.shape[1:])  # (H, 3, E, ...)
    return by_head.swapaxes(0, 1).reshape(rows.shape)


def _head(state: State, config: EncoderConfig, layout: Layout) -> Weights:
    if f"{layout.head_dense}.weight" not in state:
        return {}
    width = config.width
    weights = {
        "lm_head.bias": state.take(layout.head_bias, (config.vocabulary,)),
        "lm_head.dense.weight": state.take(f"{layout.head_dense}.weight", (width, width)),
        "lm_head.dense.bias": state.take(f"{layout.head_dense}.bias", (width,)),
        "lm_head.norm.weight": state.take(f"{layout.head_norm}.weight", (width,)),
        "lm_head.norm.bias": state.take(f"{layout.head_norm}.bias", (width,)),
    }
    if layout.head_tied in state and not state.equal(layout.head_tied, f"{layout.tokens}.weight"):
        # our head scores tokens by the token table; with a table of its own its numbers would be others
        log.warning("language-model head left out: it has a token table of its own file=%s", state.where)
        return {}
    return weights


def from_ours(weights: Weights, config: EncoderConfig, layout: Layout) -> Weights:
    """Give our tensors another tool's names and arrangement, the inverse of `to_ours` for three separate maps."""
    width = config.width
    theirs = {f"{layout.tokens}.weight": weights["tokens.weight"]}
    if config.positions == "learned":
        # rows before the first position belong to no token
        unused = np.zeros((layout.first_position, width), np.float32)
        theirs[f"{layout.positions}.weight"] = np.concatenate([unused, weights["positions.weight"]])
    for part in ("weight", "bias"):
        for ours, name in layout.modules(config).items():
            theirs[f"{name}.{part}"] = weights[f"{ours}.{part}"]
        for number in range(config.layers):
            thirds = np.split(weights[f"layers.{number}.qkv.{part}"], 3)
            for name, third in zip(layout.projections(number), thirds, strict=True):
                theirs[f"{name}.{part}"] = np.ascontiguousarray(third)
        if "lm_head.bias" in weights and layout.head_dense:
            theirs[f"{layout.head_dense}.{part}"] = weights[f"lm_head.dense.{part}"]
            theirs[f"{layout.head_norm}.{part}"] = weights[f"lm_head.norm.{part}"]
            theirs[layout.head_bias] = weights["lm_head.bias"]
    return theirs
