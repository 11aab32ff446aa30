"""Attend within each protein of a pack, forth and back, without padding or mask, for training.

Dimension letters: T tokens of a pack, N proteins of one length, L tokens of one of these, D width, H heads, E = D / H.
"""

from __future__ import annotations

__all__ = ["attend_packed"]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedbio.encoder.network import Runs, rotary_tables, turn

SCORES_BYTES = 4 * 2**20
"""Scores of so many bytes are worked on at a time: what a product has written is still in the cache for the next."""


ROOM = 1 << 18
"""Scores whose memory is taken in multiples of so many."""


def attend_packed(qkv: Tensor, runs: Runs, heads: int, *, rotary: bool) -> Tensor:
    """Attend within each protein of a pack.

    Parameters
    ----------
    qkv : Tensor, shape (T, 3D)
        Queries, keys and values of all tokens.
    runs : sequence of (int, int)
        See `fedbio.encoder.network.Runs`. On a CPU, rows after the last protein are allowed, and become zero.
    heads : int
    rotary : bool
        Turn queries and keys by their positions first.

    Returns
    -------
    Tensor, shape (T, D)
    """
    if qkv.device.type == "cpu" and not rotary:
        mixed: Tensor = _Packed.apply(qkv, runs, heads)  # type: ignore[no-untyped-call]
        return mixed
    return _fused(qkv, runs, heads, rotary=rotary)


def _fused(qkv: Tensor, runs: Runs, heads: int, *, rotary: bool) -> Tensor:
    """PyTorch's own attention, one call for each length; on CUDA it is the flash kernel, and keeps no scores."""
    parts = []
    for part, (count, length) in zip(torch.split(qkv, [n * length for n, length in runs]), runs, strict=True):
        q, k, v = part.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()  # (N, H, L, E) each
        if rotary:
            cosine, sine = rotary_tables(length, q.shape[-1], q.device)
            q, k = turn(q, cosine, sine), turn(k, cosine, sine)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, H, L, E)
        parts.append(mixed.transpose(1, 2).reshape(count * length, -1))  # (N * L, D)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Packed(torch.autograd.Function):
    """Attention on a CPU as batched products.

    Without AMX, oneDNN multiplies bfloat16 in these several times faster than PyTorch's fused kernel does. The shares
    (softmax of the scores) are kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, runs: Runs, heads: int) -> Tensor:
        mixed = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # (T, D)
        mixed[sum(count * length for count, length in runs) :] = 0  # rows of no protein
        scale = (qkv.shape[1] // 3 // heads) ** -0.5
        kept: list[Tensor] = []
        for first, count, length in _portions(runs, heads, qkv.element_size()):
            q, k, v = _by_head(qkv, first, count, length, heads, parts=3)  # (N * H, L, E) each
            scores, shares = _square(q), _square(q)  # (N * H, L, L)
            torch.softmax(torch.bmm(q.mul_(scale), k.mT, out=scores), dim=-1, out=shares)
            out = mixed[first : first + count * length].view(count, length, heads, -1)  # (N, L, H, E)
            out.copy_(torch.bmm(shares, v).view(count, heads, length, -1).transpose(1, 2))
            kept.append(shares)
        ctx.save_for_backward(qkv, *kept)
        ctx.runs, ctx.heads, ctx.scale = runs, heads, scale
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (d_mixed,) = gradients
        qkv, *kept = ctx.saved_tensors
        heads = ctx.heads
        d_qkv = torch.empty_like(qkv)
        d_qkv[sum(count * length for count, length in ctx.runs) :] = 0
        for (first, count, length), shares in zip(_portions(ctx.runs, heads, qkv.element_size()), kept, strict=True):
            q, k, v = _by_head(qkv, first, count, length, heads, parts=3)
            (d_out,) = _by_head(d_mixed, first, count, length, heads, parts=1)  # (N * H, L, E)
            d_part = q.new_empty(3, *q.shape)
            torch.bmm(shares.mT, d_out, out=d_part[2])
            d_shares = torch.bmm(d_out, v.mT, out=_square(q))  # (N * H, L, L)
            d_scores = torch.ops.aten._softmax_backward_data(d_shares, shares, -1, shares.dtype)
            torch.bmm(d_scores, k, out=d_part[0])
            torch.bmm(d_scores.mT, q, out=d_part[1])
            d_part[:2].mul_(ctx.scale)
            rows = d_qkv[first : first + count * length].view(count, length, 3, heads, -1)
            rows.copy_(d_part.view(3, count, heads, length, -1).permute(1, 3, 0, 2, 4))
        return d_qkv, None, None


def _square(q: Tensor) -> Tensor:
    """Make room for scores, (N * H, L, E) -> (N * H, L, L).

    The room is rounded up to one of a few sizes: a heap of pieces of thousands of sizes would grow to several times
    what is used at once.
    """
    shape = (*q.shape[:-1], q.shape[-2])
    size = q.shape[0] * q.shape[1] ** 2
    return q.new_empty(-(-size // ROOM) * ROOM)[:size].view(shape)


def _portions(runs: Runs, heads: int, item_bytes: int) -> list[tuple[int, int, int]]:
    """Cut runs into portions that fit the cache: (first token, proteins, tokens of each)."""
    portions = []
    first = 0
    for count, length in runs:
        most = max(1, SCORES_BYTES // (heads * length * length * item_bytes))
        for done in range(0, count, most):
            some = min(most, count - done)
            portions.append((first, some, length))
            first += some * length
    return portions


def _by_head(x: Tensor, first: int, count: int, length: int, heads: int, *, parts: int) -> tuple[Tensor, ...]:
    """Copy some proteins' rows (N * L, parts * D) into `parts` contiguous tensors of (N * H, L, E)."""
    rows = x[first : first + count * length].view(count, length, parts, heads, -1)
    return rows.permute(2, 0, 3, 1, 4).contiguous().view(parts, count * heads, length, -1).unbind()
