"""How much memory embedding takes, and the largest packs that keep it below a bound."""

from __future__ import annotations

__all__ = [
    "PROTEIN_BYTES",
    "SCORES_AT_HAND",
    "bound_kernel_caches",
    "check_memory",
    "fitting_budget",
    "fitting_lanes",
    "grown_bytes",
    "needed_bytes",
    "part_tokens",
    "read_size",
]

import os
import re

from fedbio.encoder.packs import ENDS
from fedbio.errors import MachineError, SettingsError
from fedbio.weights import EncoderConfig

BASE_BYTES = 450 * 2**20
"""Python, torch, HDF5, and rows on their way to the disk; measured by ``benchmarks/embed_memory.py``."""
PROTEIN_BYTES = 150
"""What each protein adds to the peak (where its sequence, its twin and its rows are); measured by the same."""
_PART_TOKENS = 512
"""A CPU's thread computes so many at a time if the encoder is wide: fewer make small products."""
_PART_NUMBERS = _PART_TOKENS * 768
"""And so many numbers of the residual stream if it is not: more do not stay in a core's cache."""
SCORES_AT_HAND = 2**20
"""Scores of attention that batched products make at a time: two megabytes in bfloat16, which a core's cache holds."""
_HEAD_PROTEINS = 65_536
"""Proteins that every run has room for: those of a block while it is planned."""

_UNITS = {"": 2**30, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def bound_kernel_caches() -> None:
    """Have oneDNN and torch keep fewer of the programs that they write for each shape of a product.

    Packs have thousands of shapes; the 1,024 programs that are kept by default took 600 MB in bfloat16. What the
    environment says already is left alone, and a process that has computed before keeps what it had.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def part_tokens(width: int) -> int:
    """Return how many tokens a CPU's thread computes at a time with an encoder of some width."""
    return max(_PART_TOKENS, _PART_NUMBERS // width // 32 * 32)


def read_size(text: str) -> int:
    """Turn a size like ``4``, ``1.5G``, ``800M`` or ``2GiB`` into bytes; without a unit it is in GiB.

    Raises
    ------
    SettingsError
        If it is not a size, or zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if found is None or not float(found[1]):
        raise SettingsError(f"memory {text!r}: expected a size like 4, 1.5G or 800M (without a unit in GiB)")
    return int(float(found[1]) * _UNITS[found[2]])


def needed_bytes(
    config: EncoderConfig,
    weights_bytes: int,
    *,
    budget: int,
    on_cpu: bool,
    row_width: int | None = None,
    lanes: int = 1,
) -> int:
    """Return the memory of this process for a pack of `budget` tokens, without what grows with the proteins.

    Parameters
    ----------
    config : EncoderConfig
    weights_bytes : int
        Size of the weights in float32.
    budget : int
        Tokens in a pack.
    on_cpu : bool
        Whether the pack is computed here, and not on an accelerator.
    row_width : int, optional
        Numbers of a row, if these are more than the encoder's width.
    lanes : int
        Threads that compute at the same time, each a part of a pack.
    """
    # the weights as they were read, and in the arithmetic and order of inference
    fixed = BASE_BYTES + 2 * weights_bytes + _HEAD_PROTEINS * PROTEIN_BYTES
    # rows that are on their way, beyond those as wide as the encoder, which are in the base
    wider = max((row_width or 0) - config.width, 0)
    fixed += 4 * wider * (_ROWS_AHEAD + _PACKS_AHEAD * budget // _SHORT_TOKENS)
    if not on_cpu:
        return fixed
    # a protein is never divided, whatever the budget
    longest = config.max_residues + ENDS
    at_once = max(budget, lanes * max(min(budget, part_tokens(config.width)), longest))
    # float32: the stream, its norm, queries, keys, values, attention's output, and the wide layer before and after GELU
    token = 4 * (8 * config.width + 2 * config.ffn)
    # attention's scores that are at hand, their exponentials, and both in float32 on the way
    scores = 12 * max(SCORES_AT_HAND, longest**2)
    return fixed + token * at_once + lanes * scores


_ROWS_AHEAD = 1_024
"""Rows that are read, joined and written at once."""
_PACKS_AHEAD = 4
"""Packs whose rows wait to be written while the next ones are computed."""
_SHORT_TOKENS = 32
"""A pack of many rows is one of peptides."""


def fitting_budget(
    config: EncoderConfig,
    weights_bytes: int,
    *,
    default: int,
    memory: int | None,
    on_cpu: bool,
    row_width: int | None = None,
) -> int:
    """Return the tokens of a pack: `default`, or as many as keep within `memory`.

    A function of the settings alone, never of what the machine has free, since the plan depends on it.

    Raises
    ------
    MachineError
        If even the smallest packs do not fit.
    """
    if memory is None:
        return default

    def needed_by(budget: int) -> int:
        return needed_bytes(config, weights_bytes, budget=budget, on_cpu=on_cpu, row_width=row_width)

    budget = default
    while budget > 128 and needed_by(budget) > memory:
        budget //= 2
    needed = needed_by(budget)
    if needed > memory:
        raise MachineError(
            f"memory of {memory / 2**20:,.0f} MiB: {config.name} takes about {needed / 2**20:,.0f} MiB with the "
            "smallest packs; allow that much (--memory), or give a smaller encoder"
        )
    return budget


def fitting_lanes(
    config: EncoderConfig,
    weights_bytes: int,
    *,
    threads: int,
    budget: int,
    memory: int | None,
    on_cpu: bool,
    row_width: int | None = None,
) -> int:
    """Return how many threads may compute at the same time: all, or as many as keep within `memory`, at least one.

    The result of embedding does not depend on it.
    """
    if memory is None or not on_cpu:
        return threads

    def needed_by(lanes: int) -> int:
        return needed_bytes(config, weights_bytes, budget=budget, on_cpu=on_cpu, row_width=row_width, lanes=lanes)

    return max((lanes for lanes in range(1, threads + 1) if needed_by(lanes) <= memory), default=1)


def grown_bytes(proteins: int, needed: int) -> int:
    """Return the memory of this process for so many proteins, of which `needed` holds a block's."""
    return needed + max(proteins - _HEAD_PROTEINS, 0) * PROTEIN_BYTES


def check_memory(proteins: int, needed: int, memory: int | None) -> None:
    """Refuse more proteins than memory has room for.

    Raises
    ------
    MachineError
        Saying how much they need.
    """
    grown = grown_bytes(proteins, needed)
    if memory is not None and grown > memory:
        raise MachineError(
            f"memory of {memory / 2**20:,.0f} MiB: {proteins:,} proteins take about {grown / 2**20:,.0f} MiB; "
            "allow that much (--memory), or divide the file with `fedbio data shard`"
        )
