"""The network of `fedbio.encoder.network` as a CPU likes it: the same weights, for inference only.

The numbers agree with the plain network up to rounding. What is different, and why:

- oneDNN does the linear maps, with weights packed beforehand, and adds bias and GELU while it has the sums in hand.
- They take a few hundred tokens at a time, which stay in a core's cache.
- oneDNN writes a program for every new shape, which takes longer than to run it. So each protein is filled up to a
  multiple of 16 tokens (a short one of 4 or 8), and all of them to a multiple of 32. Attention leaves out what was
  filled in; neighbours of one filled-up length share a call of it, without a copy.
- One core takes a whole call. Cores that share each product would wait for one another a hundred times in a pack.

Dimension letters as there; P is the filled-up length of a protein.
"""

from __future__ import annotations

__all__ = ["CpuEncoder", "filled_up"]

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fedbio.encoder.linear import Linear, make_linear
from fedbio.encoder.memory import part_tokens
from fedbio.encoder.network import Encoder, Layer, Runs, attend, rotary_tables, turn
from fedbio.weights import EncoderConfig

_TOKENS_STEP = 32


def filled_up(length: int) -> int:
    """Return the length that a protein of some tokens has here."""
    return _round_up(length, 4 if length <= 64 else 8 if length <= 256 else 16)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class _Layout(NamedTuple):
    """Where the tokens of a pack are when its proteins are filled up."""

    places: Tensor
    """Of each token, shape (T of the pack,)."""
    groups: list[tuple[int, int, Tensor | None]]
    """Neighbours of one length: their number N, this length P, and which tokens are real, (N, 1, 1, P), if not all."""
    tokens: int
    """T here: real tokens and others."""


def _lay_out(runs: Runs) -> _Layout:
    places, groups, start = [], [], 0
    for longest, neighbours in itertools.groupby(runs, key=lambda run: filled_up(run[1])):
        lengths = torch.tensor([length for count, length in neighbours for _ in range(count)])  # (N,)
        real = torch.arange(longest) < lengths[:, None]  # (N, P)
        places.append(start + real.flatten().nonzero()[:, 0])
        groups.append((len(real), longest, None if real.all() else real[:, None, None]))
        start += real.numel()
    return _Layout(torch.cat(places), groups, _round_up(start, _TOKENS_STEP))


class CpuEncoder:
    """An encoder for calls by one thread each.

    Parameters
    ----------
    network : Encoder
        Float32, on the CPU; its tables and norms are shared, its linear maps packed.
    dtype : torch.dtype
        Of linear maps and attention, float32 or bfloat16.
    int8 : bool
        Multiply bytes in the linear maps.
    """

    def __init__(self, network: Encoder, dtype: torch.dtype, *, int8: bool = False) -> None:
        self._network = network
        make = functools.partial(make_linear, dtype=dtype, int8=int8)
        self._layers = [_CpuLayer(cast("Layer", layer), network.config, make) for layer in network.layers]

    def __call__(self, tokens: Tensor, runs: Runs, layer: int | None = None) -> Tensor:
        """Encode a pack, see `fedbio.encoder.network.Encoder.forward`."""
        last = len(self._layers) if layer is None else layer
        layout = _lay_out(runs)
        x = torch.zeros(layout.tokens, self._network.config.width)  # (T, D)
        x[layout.places] = self._network.embed(tokens, runs)
        for block in self._layers[:last]:
            block(x, layout)
        x = x[layout.places]
        return self._network.final_norm(x) if last == len(self._layers) else x


class _CpuLayer:
    def __init__(self, layer: Layer, config: EncoderConfig, make: Callable[..., Linear]) -> None:
        self._heads = config.heads
        self._rotary = config.positions == "rotary"
        self._part_tokens = part_tokens(config.width)
        self._attention_norm, self._ffn_norm = layer.attention_norm, layer.ffn_norm
        self._qkv = make(layer.qkv.weight, layer.qkv.bias)
        self._out = make(layer.out.weight, layer.out.bias)
        self._up = make(layer.up.weight, layer.up.bias, activation=config.activation)
        self._down = make(layer.down.weight, layer.down.bias)

    def __call__(self, x: Tensor, layout: _Layout) -> None:  # (T, D), changed in place
        parts = -(-len(x) // self._part_tokens)
        size = _round_up(-(-len(x) // parts), _TOKENS_STEP)
        qkv = _joined([self._qkv(self._attention_norm(rows)) for rows in torch.split(x, size)])  # (T, 3D)
        mixed = self._attention(qkv, layout)  # (T, D)
        for rows, attended in zip(torch.split(x, size), torch.split(mixed, size), strict=True):
            rows += self._out(attended)  # (rows, D)
            rows += self._down(self._up(self._ffn_norm(rows)))  # (rows, D)

    def _attention(self, qkv: Tensor, layout: _Layout) -> Tensor:
        """Attend within each protein, (T, 3D) -> (T, D)."""
        mixed, start = [], 0
        for proteins, longest, real in layout.groups:
            stop = start + proteins * longest
            q_k_v = qkv[start:stop].view(proteins, longest, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = q_k_v.unbind()  # (N, H, P, E) each
            if self._rotary:
                cosine, sine = rotary_tables(longest, q.shape[-1], q.device)
                q, k = turn(q, cosine, sine), turn(k, cosine, sine)
            mixed.append(attend(q, k, v, real).transpose(1, 2).reshape(stop - start, -1))  # (N P, D)
            start = stop
        if start < len(qkv):
            mixed.append(qkv.new_zeros(len(qkv) - start, mixed[0].shape[1]))
        return _joined(mixed)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
