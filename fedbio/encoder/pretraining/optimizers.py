"""What makes an update of a gradient: AdamW for all weights, or Muon for the matrices of the linear maps."""

from __future__ import annotations

__all__ = ["Optimizers", "check_optimizer"]

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from fedbio.encoder.pretraining.recipe import Recipe
from fedbio.errors import MachineError

MUON_MOMENTUM = 0.95


class Optimizers:
    """AdamW [1]_ and, where the recipe says so, Muon [2]_ over one vector of weights.

    Muon moves a matrix by the nearest orthogonal one to its mean gradient, so that rare directions are learnt as
    fast as frequent ones; scaled to the length of AdamW's steps [3]_, it takes the same rates and decay.

    Parameters
    ----------
    recipe : Recipe
    values, gradient : Tensor, shape (P,), float32
        All weights, matrices first; both are looked at anew in each `step`.
    matrices : sequence of (int, int)
        The shapes of the matrices that `values` begins with; these decay, the rest does not.

    Attributes
    ----------
    vectors : dict of str to Tensor
        All that the next step depends on, besides how many there were: ``mean`` and ``square``.

    Raises
    ------
    MachineError
        If this PyTorch has no Muon.

    References
    ----------
    .. [1] Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, arXiv 1711.05101.
    .. [2] Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    .. [3] Liu et al., "Muon is scalable for LLM training", 2025, arXiv 2502.16982, section 2.2.
    """

    def __init__(self, recipe: Recipe, values: Tensor, gradient: Tensor, matrices: Sequence[tuple[int, int]]) -> None:
        decaying = sum(prod(shape) for shape in matrices)
        muon = recipe.optimizer == "muon"
        begin = decaying if muon else 0
        mean, square = torch.zeros_like(values), torch.zeros_like(values[begin:])
        self.vectors = {"mean": mean, "square": square}
        self._adamw = _adamw(recipe, values[begin:], gradient[begin:], mean[begin:], square, decaying - begin)
        self._all: list[torch.optim.Optimizer] = [self._adamw]
        if muon:
            self._all.append(_muon(recipe, values, gradient, mean, matrices))

    def step(self, rate: float) -> None:
        """Change the values by the gradient at a learning rate."""
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def go_on_after(self, steps: int) -> None:
        """Take the vectors as they are now for those after so many steps."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)


def check_optimizer(recipe: Recipe) -> None:
    """Make sure that this PyTorch has the recipe's optimizer.

    Raises
    ------
    MachineError
        If it has no Muon.
    """
    if recipe.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise MachineError(
            f"PyTorch {torch.__version__} has no Muon; install 2.9 or later, or train with --optimizer adamw "
            "--weight-decay 0.01"
        )


def _adamw(
    recipe: Recipe, values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, decaying: int
) -> torch.optim.Optimizer:
    groups, states = [], []
    for part, decay in ((slice(0, decaying), recipe.weight_decay), (slice(decaying, None), 0.0)):
        if not len(values[part]):
            continue
        groups.append({"params": [_parameter(values[part], gradient[part])], "weight_decay": decay})
        step = torch.zeros((), dtype=torch.float32, device=values.device)
        states.append({"step": step, "exp_avg": mean[part], "exp_avg_sq": square[part]})
    betas = (recipe.beta1, recipe.beta2)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, fused=True)
    for group, state in zip(optimizer.param_groups, states, strict=True):
        optimizer.state[group["params"][0]] = state
    return optimizer


def _muon(
    recipe: Recipe, values: Tensor, gradient: Tensor, mean: Tensor, matrices: Sequence[tuple[int, int]]
) -> torch.optim.Optimizer:
    check_optimizer(recipe)
    sizes = [prod(shape) for shape in matrices]

    def cut(vector: Tensor) -> list[Tensor]:
        parts = torch.split(vector[: sum(sizes)], sizes)
        return [part.view(shape) for part, shape in zip(parts, matrices, strict=True)]

    parameters = [_parameter(*pair) for pair in zip(cut(values), cut(gradient), strict=True)]
    optimizer = torch.optim.Muon(
        parameters,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    for parameter, part in zip(parameters, cut(mean), strict=True):
        optimizer.state[parameter] = {"momentum_buffer": part}
    return optimizer


def _parameter(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return parameter
