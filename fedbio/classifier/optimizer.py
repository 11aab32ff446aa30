"""AdamW over all parameters of a network as one vector: a few operations per step, whatever the number of layers.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2. It agrees with `torch.optim.AdamW`,
whose first use imports torch's compiler, a second and a half in each process.
"""

from __future__ import annotations

__all__ = ["AdamW"]

import math

import torch
from torch import Tensor, nn

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class AdamW:
    """Take over a network's parameters and step against the gradient of a loss.

    Parameters
    ----------
    network : torch.nn.Module
        Its parameters become views of one vector.
    learning_rate, weight_decay : float
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._parameters = list(network.parameters())
        self._values = torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, view in zip(self._parameters, torch.split(self._values, sizes), strict=True):
            parameter.data = view.view_as(parameter)
        self._gradient, self._scratch = torch.empty_like(self._values), torch.empty_like(self._values)
        self._mean, self._square = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._steps = 0

    def step(self, loss: Tensor) -> None:
        """Change the parameters in place by one step."""
        gradients = torch.autograd.grad(loss, self._parameters)
        gradient = torch.cat([each.reshape(-1) for each in gradients], out=self._gradient)
        self._steps += 1
        self._mean.lerp_(gradient, 1 - BETA1)
        self._square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        unbiased = math.sqrt(1 - BETA2**self._steps)
        deviation = torch.sqrt(self._square, out=self._scratch).div_(unbiased).add_(EPSILON)
        self._values.mul_(1 - self._learning_rate * self._weight_decay)
        self._values.addcdiv_(self._mean, deviation, value=-self._learning_rate / (1 - BETA1**self._steps))
