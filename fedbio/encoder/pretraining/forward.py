"""The encoder's forward pass for training: the network's own modules, with what pays only when gradients follow.

The result is that of `fedbio.encoder.network.Encoder`; what differs is the arithmetic between the linear maps: the
residual stream has their dtype, as Megatron trains in bfloat16, and attention has a backward pass of its own. A
test holds the two together.

Dimension letters: T tokens of a pack, M masked ones, D width, F width of the feed-forward network, V vocabulary.
"""

from __future__ import annotations

__all__ = ["hidden_states", "masked_logits"]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedbio.encoder.network import Encoder, Runs
from fedbio.encoder.pretraining.attention import attend_packed

ROWS = 256
"""On a CPU a pack has a multiple of so many rows, the last of which belong to no protein: for each new shape oneDNN
makes a product anew, and tensors of ever other sizes tear the heap apart."""


def hidden_states(network: Encoder, tokens: Tensor, runs: Runs, *, mask: int) -> Tensor:
    """Encode a pack of which some tokens are masked.

    Parameters
    ----------
    network : Encoder
        Its linear maps may be bfloat16; norms and tables are float32.
    tokens : Tensor, shape (T,), int64
    runs : sequence of (int, int)
        See `fedbio.encoder.network.Runs`.
    mask : int
        Number of the mask token.

    Returns
    -------
    Tensor, shape (T, D)
        After the final norm, in the dtype of the linear maps.
    """
    config = network.config
    x = network.tokens(tokens)  # (T, D)
    if config.token_scale != 1:
        # token dropout of ESM-1b and ESM-2: masked tokens are zero, and the rest is scaled to 12 % of such; here these
        # 12 % are there, so the factor is one
        x = x * (tokens != mask).to(x.dtype)[:, None]
    if config.positions == "learned":
        longest = max(length for _, length in runs)
        steps = torch.arange(longest, device=tokens.device)
        x = x + network.positions(torch.cat([steps[:length].repeat(count) for count, length in runs]))
    x = x.to(network.lm_head.dense.weight.dtype)
    if x.device.type == "cpu" and config.positions != "rotary":
        x = F.pad(x, (0, 0, 0, -len(x) % ROWS))
    if config.embedding_norm:
        x = _norm(x, network.embedding_norm)
    activation = "tanh" if config.activation == "gelu_tanh" else "none"
    for layer in network.layers:
        qkv = _linear(_norm(x, layer.attention_norm), layer.qkv)  # type: ignore[arg-type]
        mixed = attend_packed(qkv, runs, config.heads, rotary=config.positions == "rotary")  # (T, D)
        x = x + _linear(mixed, layer.out)  # type: ignore[arg-type]
        h = _linear(_norm(x, layer.ffn_norm), layer.up)  # type: ignore[arg-type]
        x = x + _linear(F.gelu(h, approximate=activation), layer.down)  # type: ignore[arg-type]
    return _norm(x, network.final_norm)[: len(tokens)]


def masked_logits(network: Encoder, hidden: Tensor, places: Tensor) -> Tensor:
    """Score the vocabulary at some tokens alone, (T, D) and (M,) -> (M, V) float32."""
    head = network.lm_head
    h = F.gelu(_linear(hidden.index_select(0, places), head.dense)).float()  # (M, D)
    return F.linear(_norm(h, head.norm), network.tokens.weight, head.bias)  # (M, V), tied


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Layer norm in the dtype of `x`, with statistics and gain in float32."""
    gain, shift, epsilon = norm.weight, norm.bias, norm.eps
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return F.layer_norm(x, gain.shape, gain, shift, epsilon)  # type: ignore[arg-type]
    return F.layer_norm(x, gain.shape, gain.to(x.dtype), shift.to(x.dtype), epsilon)  # type: ignore[arg-type]


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    if x.device.type == "cpu":
        y: Tensor = _CpuLinear.apply(x, linear.weight, linear.bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, linear.weight, linear.bias)


class _CpuLinear(torch.autograd.Function):
    """A linear map whose bias gradient is a product too: a sum over the rows of a bfloat16 matrix is slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        return g @ weight, g.mT @ x, (g.new_ones(1, len(g)) @ g).view(-1)
