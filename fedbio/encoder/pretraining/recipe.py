"""What a pre-training run is made of: the architecture, and every number that its result depends on."""

from __future__ import annotations

__all__ = ["PRESETS", "Preset", "Recipe", "changed_keys", "learning_rate", "settled_steps"]

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from fedbio.weights import EncoderConfig

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers that the trained weights depend on; a run that goes on must go on with the same.

    Parameters
    ----------
    seed : int
        Of the first weights, the order of the proteins, the windows and the masks.
    steps : int
        Length of the schedule in updates of the weights.
    pack_tokens : int
        The most tokens that go through the network at once.
    packs : int
        Packs in one update, over all processes.
    learning_rate, final_share : float
        The highest rate, and the share of it at which the cosine ends.
    warmup_steps : int
        Updates over which the rate rises to its highest.
    decay_share : float
        Last part of the schedule, over which the rate falls along the cosine; before it the rate stays at its highest,
        and `steps` may still be changed [1]_. 1: it falls from the end of the warm-up on.
    optimizer : str
        ``"adamw"``, or ``"muon"``: that for the matrices of the linear maps, AdamW for the rest.
    weight_decay, beta1, beta2, epsilon : float
        Of AdamW, the first of Muon too; norms, biases and tables do not decay.
    clip : float
        The longest gradient, by its Euclidean norm.
    mask_share : float
        Residues that are to be predicted; of these, `mask_token_share` are hidden behind the mask token and
        `random_share` replaced by another residue. The rest stays as it is.
    average : str
        ``"none"``; ``"ema"``: an exponential average of the weights, of `average_decay`; ``"tail"``: their mean over
        the last `average_share` of the schedule. The average is what is written as the encoder.
    dtype : str
        ``"bfloat16"`` or ``"float32"``: the arithmetic of the linear maps and of attention.

    References
    ----------
    .. [1] Hu et al., "MiniCPM: unveiling the potential of small language models with scalable training strategies",
       2024, arXiv 2404.06395, section 4 (warm-up, stable, decay).
    """

    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    steps: _Count = 10_000
    pack_tokens: _Count = 8_192
    packs: _Count = 2
    learning_rate: _Positive = 1e-3
    final_share: _Share = 0.1
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 500
    decay_share: _Share = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    beta1: _Share = 0.9
    beta2: _Share = 0.98
    epsilon: _Positive = 1e-8
    clip: _Positive = 1.0
    mask_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.15
    mask_token_share: _Share = 0.8
    random_share: _Share = 0.1
    average: Literal["none", "ema", "tail"] = "tail"
    average_decay: _Share = 0.999
    average_share: _Share = 0.1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.mask_token_share + self.random_share > 1:
            raise ValueError(
                f"mask_token_share {self.mask_token_share} and random_share {self.random_share} exceed 1 together"
            )


@dataclass(frozen=True)
class Preset:
    """An architecture and the recipe that suits it."""

    config: EncoderConfig
    recipe: Recipe


PRESETS = {
    # ESM-1nv as BioNeMo 1.10 published it; its recipe is for 10**12 tokens on 176 GPUs, this one for 10**9 on one
    "esm1nv-44m": Preset(
        EncoderConfig(name="esm1nv-44m"),
        Recipe(steps=10_000, pack_tokens=65_536, packs=2, learning_rate=8e-4, warmup_steps=500),
    ),
    # GELU by the error function costs a CPU a third of the tanh form
    "esm1nv-mini": Preset(
        EncoderConfig(name="esm1nv-mini", layers=6, heads=4, width=256, ffn=1024, activation="gelu"),
        Recipe(
            steps=10_000,
            pack_tokens=8_192,
            packs=1,
            optimizer="muon",
            weight_decay=0.1,
            learning_rate=2e-3,
            warmup_steps=300,
            decay_share=0.2,
            # twice the targets for the same arithmetic; trials are in docs/pretraining.md
            mask_share=0.3,
        ),
    ),
}
"""What ``--preset`` names."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate of an update, counted from 0: up along a line, perhaps level, then down along half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    begin = _decay_begin(recipe)
    through = min(1.0, max(0, step - begin) / max(1, recipe.steps - begin))
    share = recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * through))
    return recipe.learning_rate * share


def _decay_begin(recipe: Recipe) -> int:
    return max(recipe.warmup_steps, recipe.steps - round(recipe.steps * recipe.decay_share))


def settled_steps(recipe: Recipe) -> int:
    """Return how many updates are the same for every longer schedule."""
    settled = _decay_begin(recipe)
    if recipe.average == "tail":
        settled = min(settled, math.floor(recipe.steps * (1 - recipe.average_share)))
    return settled


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say for each key that differs what it was and what it is."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
