"""The MLP in torch: linear layers, ReLU and dropout. B proteins, D inputs, H hidden units, C classes."""

from __future__ import annotations

__all__ = ["Network", "as_tensor"]

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbio.classifier.architecture import Parameters, layer_widths


def as_tensor(features: NDArray[np.float32]) -> Tensor:
    """Look at an array as a tensor; one that is read-only, strided or of another type is copied."""
    return torch.from_numpy(np.require(features, np.float32, ["C", "W"]))


class Network(nn.Module):
    """An MLP from its parameters; ``layers.I`` are `torch.nn.Linear`.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
        Copied.
    dropout : float
        Share of each hidden layer's units that training switches off.
    generator : torch.Generator, optional
        Where dropout draws from; torch's global one stays untouched.
    """

    def __init__(
        self, parameters: Parameters, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self._kept, self._generator = 1.0 - dropout, generator
        self.layers = nn.ModuleList()
        for layer in range(len(layer_widths(parameters)) - 1):
            weight, bias = parameters[f"layers.{layer}.weight"], parameters[f"layers.{layer}.bias"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight = nn.Parameter(torch.from_numpy(np.array(weight)))
            linear.bias = nn.Parameter(torch.from_numpy(np.array(bias)))
            self.layers.append(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (B, C), for embeddings, shape (B, D)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))  # (B, H)
            if self.training and self._kept < 1:
                # twice as fast as bernoulli_, which torch draws in double precision
                x = x * torch.rand(x.shape, generator=self._generator).lt_(self._kept).div_(self._kept)
        logits: Tensor = last(x)  # (B, C)
        return logits

    def to_parameters(self) -> Parameters:
        """Return the parameters as arrays of their own."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self.named_parameters()}
