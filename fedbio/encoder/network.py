"""The encoder network: ESM-1nv, and with other settings ESM-1b, ESM-1v and ESM-2, on packed proteins.

A pack is several proteins laid end to end, each with its start and end token, without padding: everything but
attention works on single tokens, and attention looks at one protein at a time.

References
----------
.. [1] BioNeMo Framework 1.10, ESM-1nv: Megatron BERT with pre-layer-norm, docs/bionemo/models/esm1-nv.md
.. [2] Rives et al. 2021 (ESM-1b) and Lin et al. 2023 (ESM-2): https://github.com/facebookresearch/esm

Dimension letters: T tokens of a pack, N proteins of one length, L tokens of one of these, D width, F width of the
feed-forward network, H heads, E = D / H, V vocabulary.
"""

from __future__ import annotations

__all__ = ["Encoder", "LanguageModelHead", "Runs", "attend", "send"]

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedbio.encoder.memory import SCORES_AT_HAND
from fedbio.weights import EncoderConfig

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

Runs = Sequence[tuple[int, int]]
"""The proteins of a pack in order: (number of neighbours of equal length, their length in tokens)."""


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in the tanh approximation, (T, F) -> (T, F)."""
    return F.gelu(x, approximate="tanh")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to a device without waiting for what the device has to do before."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=8)
def borders_and_positions(runs: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each protein of a pack begins, and T at last, (proteins + 1,) int32; a token's place in its own, (T,)."""
    with torch.inference_mode(False):  # what is kept serves training, too
        lengths = torch.tensor([length for count, length in runs for _ in range(count)])
        borders = F.pad(lengths.cumsum(0), (1, 0))  # (proteins + 1,)
        positions = torch.arange(int(borders[-1])) - torch.repeat_interleave(borders[:-1], lengths)  # (T,)
        return send(borders.int(), device), send(positions, device)


@functools.lru_cache(maxsize=64)
def rotary_tables(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine by which a query or key turns at each position, two of (length, size) float32."""
    with torch.inference_mode(False):
        speeds = 1.0 / (10000 ** (torch.arange(0, size, 2, device=device).float() / size))  # (E / 2,)
        angles = torch.outer(torch.arange(length, device=device).float(), speeds)  # (L, E / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (L, E)
        return angles.cos(), angles.sin()


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn queries or keys (..., L, E) by their positions, RoFormer in the half-split form of ESM-2."""
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)


@functools.cache
def _fused_is_slow(dtype: torch.dtype) -> bool:
    """Whether the fused attention of a CPU multiplies no faster than in float32: bfloat16, unless in tiles (AMX)."""
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == torch.bfloat16 and not able.get("amx_bf16")


def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of whole proteins.

    Parameters
    ----------
    q, k, v : Tensor, shape (N, H, L, E)
    real : Tensor, shape (N, 1, 1, L), bool, optional
        Which tokens may be looked at, at least one of each protein; by default all.

    Returns
    -------
    Tensor, shape (N, H, L, E)
    """
    if q.device.type != "cpu" or not _fused_is_slow(q.dtype):
        return F.scaled_dot_product_attention(q, k, v, real)
    # oneDNN's batched products are fast
    longest, heads = q.shape[2], q.shape[1]
    mixed = []
    step = max(1, SCORES_AT_HAND // longest**2)
    for protein, first in itertools.product(range(len(q)), range(0, heads, step)):
        some = protein, slice(first, first + step)
        scores = torch.bmm(q[some] * q.shape[-1] ** -0.5, k[some].mT)  # (h, L, L)
        if real is not None:
            scores.masked_fill_(~real[protein], -torch.inf)
        mixed.append(torch.bmm(torch.softmax(scores, dim=-1), v[some]))  # (h, L, E)
    return torch.cat(mixed).view(q.shape)


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
        dtype = self.qkv.weight.dtype
        h = self.attention_norm(x).to(dtype)  # (T, D)
        x = x + self.out(self.attention(self.qkv(h), runs))  # (T, D)
        h = self.ffn_norm(x).to(dtype)  # (T, D)
        h = self.activation(self.up(h))  # (T, F)
        update: Tensor = self.down(h)  # (T, D)
        return x + update

    def attention(self, qkv: Tensor, runs: Runs) -> Tensor:
        """Attend within each protein, (T, 3D) -> (T, D)."""
        if varlen_attn is not None and qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
            return self.flash_attention(qkv, runs)
        mixed = []
        start = 0
        for count, length in runs:
            stop = start + count * length
            q, k, v = (
                qkv[start:stop].view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
            )  # (N, H, L, E) each
            if self.rotary:
                cosine, sine = rotary_tables(length, q.shape[-1], q.device)
                q, k = turn(q, cosine, sine), turn(k, cosine, sine)
            mixed.append(attend(q, k, v).transpose(1, 2).reshape(count * length, -1))  # (N L, D)
            start = stop
        return torch.cat(mixed)

    def flash_attention(self, qkv: Tensor, runs: Runs) -> Tensor:
        """Attend within all proteins of a pack in one kernel, (T, 3D) -> (T, D)."""
        borders, positions = borders_and_positions(tuple(runs), qkv.device)
        longest = max(length for _, length in runs)
        q, k, v = qkv.view(len(qkv), 3, self.heads, -1).unbind(1)  # (T, H, E) each
        if self.rotary:
            cosine, sine = (
                table[positions][:, None] for table in rotary_tables(longest, q.shape[-1], q.device)
            )  # (T, 1, E) each
            q, k = turn(q, cosine, sine), turn(k, cosine, sine)
        mixed = varlen_attn(q, k, v, borders, borders, longest, longest)  # (T, H, E)
        assert isinstance(mixed, Tensor)
        return mixed.flatten(1)


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
        x: Tensor = self.embed(tokens, runs)
        last = len(self.layers) if layer is None else layer
        for block in self.layers[:last]:
            x = block(x, runs)
        if last == len(self.layers):
            x = self.final_norm(x)
        return x

    def embed(self, tokens: Tensor, runs: Runs) -> Tensor:
        """What enters the first layer, (T,) -> (T, D) float32."""
        longest = max(length for _, length in runs)
        if longest > self.config.max_tokens:
            raise ValueError(f"a protein of {longest} tokens; {self.config.name} takes {self.config.max_tokens}")
        x: Tensor = self.tokens(tokens).float() * self.config.token_scale  # (T, D)
        if self.config.positions == "learned":
            _, positions = borders_and_positions(tuple(runs), tokens.device)
            x = x + self.positions(positions)  # (T, D)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary, (T, D) -> (T, V)."""
        return self.lm_head(hidden, self.tokens)  # type: ignore[no-any-return]
