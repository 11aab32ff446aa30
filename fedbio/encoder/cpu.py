"""The network of `fedbio.encoder.network` as a CPU likes it: the same weights, for inference only.

The numbers agree with the plain network up to rounding. What is different, and why:

- oneDNN does the linear maps, with weights packed beforehand, and adds bias and GELU while it has the sums in hand.
- What stands between two attentions is computed for a few hundred tokens at a time, which stay in a core's cache.
- oneDNN writes a program for every new shape, which takes longer than to run it. So lengths are rounded up: that of a
  pack to a multiple of 32, that of a protein within attention to a multiple of 16, where neighbours of one rounded
  length share a product.
- One core takes a whole call. Cores that share each product would wait for one another a hundred times in a pack.

Dimension letters as there; P is the rounded length of a protein within attention.
"""

from __future__ import annotations

__all__ = ["CpuEncoder"]

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedbio.encoder.linear import Linear, make_linear
from fedbio.encoder.network import Encoder, Layer, Runs, rotary_tables, turn
from fedbio.weights import EncoderConfig

_ROWS = 512
_TOKENS_STEP = 32
_LENGTH_STEP = 16
# scores of attention that are at hand at once: two megabytes in bfloat16, which a core's cache holds
_SCORES = 2**20
# a sum of exponentials beyond these is computed again with the maximum subtracted
_LEAST, _MOST = 1e-30, 1e30


def _round_up(length: int, step: int) -> int:
    return -(-length // step) * step


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
        x = F.pad(self._network.embed(tokens, runs), (0, 0, 0, -len(tokens) % _TOKENS_STEP))  # (T, D)
        for block in self._layers[:last]:
            block(x, runs)
        x = x[: len(tokens)]
        return self._network.final_norm(x) if last == len(self._layers) else x


class _CpuLayer:
    def __init__(self, layer: Layer, config: EncoderConfig, make: Callable[..., Linear]) -> None:
        self._heads = config.heads
        self._rotary = config.positions == "rotary"
        self._attention_norm, self._ffn_norm = layer.attention_norm, layer.ffn_norm
        # queries come out divided by the root of their size
        scale = torch.ones(3 * config.width, 1)
        scale[: config.width] = (config.width / config.heads) ** -0.5
        self._qkv = make(layer.qkv.weight * scale, layer.qkv.bias * scale[:, 0])
        self._out = make(layer.out.weight, layer.out.bias)
        self._up = make(layer.up.weight, layer.up.bias, activation=config.activation)
        self._down = make(layer.down.weight, layer.down.bias)

    def __call__(self, x: Tensor, runs: Runs) -> None:  # (T, D), changed in place
        qkv = self._qkv(self._attention_norm(x))  # (T, 3D)
        mixed = qkv.new_zeros(x.shape)  # (T, D)
        start = 0
        for group in _groups(runs):
            stop = start + sum(count * length for count, length in group)
            self._attend(qkv[start:stop], mixed[start:stop], group)
            start = stop
        for rows, attended in zip(torch.split(x, _ROWS), torch.split(mixed, _ROWS), strict=True):
            rows += self._out(attended)  # (rows, D)
            rows += self._down(self._up(self._ffn_norm(rows)))  # (rows, D)

    def _attend(self, qkv: Tensor, mixed: Tensor, group: Runs) -> None:
        """Attend within proteins of one rounded length, (T, 3D) into (T, D).

        Beyond a protein's end, queries, keys and values are zero, and so is a last column of the values that is one
        elsewhere. In the product with the exponentials this column becomes their sum over real keys: to divide by it is
        the softmax, and no mask is needed.
        """
        proteins = sum(count for count, _ in group)
        size = mixed.shape[1] // self._heads
        longest = _round_up(group[0][1], _LENGTH_STEP)
        q, k = qk = qkv.new_empty(2, proteins, self._heads, longest, size)  # (2, N, H, P, E)
        v = qkv.new_empty(proteins, self._heads, longest, size + 1)  # (N, H, P, E + 1)
        for which, (length, source) in _proteins(qkv, group, self._heads, mixed.shape[1]):  # (n, L, 3, H, E)
            q_k_v = source.permute(2, 0, 3, 1, 4)  # (3, n, H, L, E)
            qk[:, which, :, :length] = q_k_v[:2]
            qk[:, which, :, length:] = 0
            v[which, :, :length, :size] = q_k_v[2]
            v[which, :, :length, size] = 1
            v[which, :, length:] = 0
        if self._rotary:
            cosine, sine = rotary_tables(longest, size, qkv.device)
            q, k = turn(q, cosine, sine), turn(k, cosine, sine)
        sums = _weigh(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(v.shape)  # (N, H, P, E + 1)
        for which, (length, target) in _proteins(mixed, group, self._heads, mixed.shape[1]):  # (n, L, 1, H, E)
            part = sums[which, :, :length].transpose(1, 2)  # (n, L, H, E + 1)
            torch.div(part[..., :size], part[..., size:], out=target[:, :, 0])  # (n, L, H, E)


def _weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sum up values by the exponentials of their scores, (B, P, E), (B, P, E), (B, P, E + 1) -> (B, P, E + 1).

    The softmax would read the scores three times more, to find a maximum without which no exponential of a usual score
    is too large for its type; where one is, the sums show it.
    """
    longest = q.shape[1]
    step = max(1, _SCORES // longest**2)
    scratch = q.new_empty(min(step, len(q)), longest, longest)
    sums = torch.empty_like(v)
    for first in range(0, len(q), step):
        some = slice(first, first + step)
        scores = torch.bmm(q[some], k[some].mT, out=scratch[: len(q[some])])  # (b, P, P)
        torch.bmm(scores.exp_(), v[some], out=sums[some])
        least, most = sums[some, :, -1].aminmax()
        if not (least > _LEAST and most < _MOST):
            scores = torch.bmm(q[some], k[some].mT, out=scores)
            scores.masked_fill_(v[some, None, :, -1] == 0, -torch.inf)
            torch.bmm(torch.softmax(scores, dim=-1), v[some], out=sums[some])
    return sums


def _groups(runs: Runs) -> Iterator[Runs]:
    """Neighbours of one rounded length."""
    for _, group in itertools.groupby(runs, key=lambda run: _round_up(run[1], _LENGTH_STEP)):
        yield list(group)


def _proteins(packed: Tensor, group: Runs, heads: int, width: int) -> Iterator[tuple[slice, tuple[int, Tensor]]]:
    """Proteins of equal length: which of the group, their length, and what is packed as (n, L, columns / D, H, E)."""
    parts = packed.view(len(packed), -1, heads, width // heads)
    first = start = 0
    for count, length in group:
        stop = start + count * length
        yield slice(first, first + count), (length, parts[start:stop].view(count, length, -1, heads, width // heads))
        first, start = first + count, stop
