"""The encoder network: ESM-1nv, and with other settings ESM-1b, ESM-1v and ESM-2, on packed proteins.

A pack is several proteins laid end to end, each with its start and end token, without padding: everything but
attention works on single tokens, and attention looks at one protein at a time. No mask exists anywhere.

References
----------
.. [1] BioNeMo Framework 1.10, ESM-1nv: Megatron BERT with pre-layer-norm, docs/bionemo/models/esm1-nv.md
.. [2] Rives et al. 2021 (ESM-1b) and Lin et al. 2023 (ESM-2): https://github.com/facebookresearch/esm

Dimension letters: T tokens of a pack, N proteins of one length, L tokens of one of these, D width, F width of the
feed-forward network, H heads, E = D / H, V vocabulary.
"""

from __future__ import annotations

__all__ = ["Encoder", "LanguageModelHead", "Runs"]

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedbio.weights import EncoderConfig

Runs = Sequence[tuple[int, int]]
"""The proteins of a pack in order: (number of neighbours of equal length, their length in tokens)."""

_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = _GELU_SLOPE * 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in the tanh approximation, (T, F) -> (T, F); the argument may be overwritten at inference."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    # (1 + tanh u) / 2 = sigmoid(2u): the same function, at half the cost of tanh on a CPU
    gate = torch.addcmul(x.new_tensor(_GELU_SLOPE), x, x, value=_GELU_CUBIC)
    return x.mul_(gate.mul_(x).sigmoid_())


def rotary_tables(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine by which a query or key turns at each position, two of (length, size) float32."""
    speeds = 1.0 / (10000 ** (torch.arange(0, size, 2, device=device).float() / size))  # (E / 2,)
    angles = torch.outer(torch.arange(length, device=device).float(), speeds)  # (L, E / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (L, E)
    return angles.cos(), angles.sin()


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn queries or keys (..., L, E) by their positions, RoFormer in the half-split form of ESM-2."""
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of whole proteins, three of (N, H, L, E) -> (N, H, L, E)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # the fused CPU kernel multiplies bfloat16 no faster than float32; oneDNN's batched product does
        scores = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)  # (N, H, L, L)
        return scores @ v
    return F.scaled_dot_product_attention(q, k, v)


class Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + ffn(norm(x)); x stays float32."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.rotary = config.positions == "rotary"
        self.activation = gelu_tanh if config.activation == "gelu_tanh" else F.gelu
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)

    def forward(self, x: Tensor, runs: Runs) -> Tensor:  # (T, D) -> (T, D)
        dtype = getattr(self.qkv, "dtype", self.qkv.weight.dtype)
        h = self.attention_norm(x).to(dtype)  # (T, D)
        x = x + self.out(self.attention(self.qkv(h), runs))  # (T, D)
        h = self.ffn_norm(x).to(dtype)  # (T, D)
        h = self.activation(self.up(h))  # (T, F)
        update: Tensor = self.down(h)  # (T, D)
        return x + update

    def attention(self, qkv: Tensor, runs: Runs) -> Tensor:
        """Attend within each protein, (T, 3D) -> (T, D)."""
        mixed = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # (T, D)
        start = 0
        for count, length in runs:
            stop = start + count * length
            q, k, v = (
                qkv[start:stop].view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
            )  # (N, H, L, E) each
            if self.rotary:
                cosine, sine = rotary_tables(length, q.shape[-1], q.device)
                q, k = turn(q, cosine, sine), turn(k, cosine, sine)
            attended = attend(q, k, v)  # (N, H, L, E)
            mixed[start:stop].view(count, length, self.heads, -1).copy_(attended.transpose(1, 2))  # (N, L, H, E)
            start = stop
        return mixed


class LanguageModelHead(nn.Module):
    """Logits of masked residues: dense, GELU by the error function, norm, and the token table once more."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    def forward(self, hidden: Tensor, tokens: nn.Embedding) -> Tensor:
        h = self.norm(F.gelu(self.dense(hidden)))  # (T, D)
        return F.linear(h, tokens.weight, self.bias)  # (T, V), tied


class Encoder(nn.Module):
    """Tokens in, one vector per token out; the language-model head exists only if it is asked for."""

    def __init__(self, config: EncoderConfig, *, head: bool = False) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_tokens, config.width)
        if config.embedding_norm:
            self.embedding_norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        if head:
            self.lm_head = LanguageModelHead(config)

    def forward(self, tokens: Tensor, runs: Runs, layer: int | None = None) -> Tensor:
        """Encode a pack.

        Parameters
        ----------
        tokens : Tensor, shape (T,), int64
            Proteins end to end, each with its start and end token.
        runs : sequence of (int, int)
            See `Runs`; the lengths times the counts sum up to T.
        layer : int, optional
            Stop after so many layers, 0 for the embedding alone.

        Returns
        -------
        Tensor, shape (T, D), float32
            Output of the last layer after the final norm, or that of an earlier one as it is.
        """
        longest = max(length for _, length in runs)
        if longest > self.config.max_tokens:
            raise ValueError(f"a protein of {longest} tokens; {self.config.name} takes {self.config.max_tokens}")
        x = self.tokens(tokens).float() * self.config.token_scale  # (T, D)
        if self.config.positions == "learned":
            steps = torch.arange(longest, device=tokens.device)
            x = x + self.positions(torch.cat([steps[:length].repeat(count) for count, length in runs]))  # (T, D)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        last = len(self.layers) if layer is None else layer
        for block in self.layers[:last]:
            x = block(x, runs)
        if last == len(self.layers):
            x = self.final_norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary, (T, D) -> (T, V)."""
        return self.lm_head(hidden, self.tokens)  # type: ignore[no-any-return]
