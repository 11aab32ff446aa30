"""The network in torch: linear layers, ReLU and dropout, perhaps after light attention.

B proteins, D inputs, H hidden units, C classes.
"""

from __future__ import annotations

__all__ = ["Network", "as_tensor", "check_input", "reader"]

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbio.classifier.architecture import Parameters, convolution_shape, layer_widths
from fedbio.classifier.attention import LightAttention
from fedbio.classifier.residues import Features, Residues
from fedbio.errors import DataError


def as_tensor(features: NDArray[np.float32]) -> Tensor:
    """Look at an array as a tensor; one that is read-only, strided or of another type is copied."""
    return torch.from_numpy(np.require(features, np.float32, ["C", "W"]))


class Network(nn.Module):
    """A network from its parameters; ``layers.I`` are `torch.nn.Linear`, ``attention`` a `LightAttention` or None.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
        Copied.
    dropout : float
        Share of each hidden layer's units, and of light attention's features, that training switches off.
    generator : torch.Generator, optional
        Where dropout draws from; torch's global one stays untouched.
    """

    def __init__(
        self, parameters: Parameters, *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self._kept, self._generator = 1.0 - dropout, generator
        self.width, *outputs = layer_widths(parameters)
        self.classes = outputs[-1]
        self.attention: LightAttention | None = None
        if convolution := convolution_shape(parameters):
            self.attention = LightAttention(parameters)
            self.width = convolution[1]
        self.layers = nn.ModuleList()
        for layer in range(len(outputs)):
            weight, bias = parameters[f"layers.{layer}.weight"], parameters[f"layers.{layer}.bias"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight = nn.Parameter(torch.from_numpy(np.array(weight)))
            linear.bias = nn.Parameter(torch.from_numpy(np.array(bias)))
            self.layers.append(linear)

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Return logits, shape (B, C), for embeddings, shape (B, D), or for what `LightAttention` takes."""
        if self.attention is not None:
            x = self._drop(self.attention(x, lengths))  # (B, 2 F)
        *hidden, last = self.layers
        for layer in hidden:
            x = self._drop(F.relu(layer(x)))  # (B, H)
        logits: Tensor = last(x)  # (B, C)
        return logits

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self._kept == 1:
            return x
        # twice as fast as bernoulli_, which torch draws in double precision
        return x * torch.rand(x.shape, generator=self._generator).lt_(self._kept).div_(self._kept)

    @property
    def threads(self) -> int:
        """How many threads to share a step between; that of an MLP is too small for more than one."""
        return 1 if self.attention is None else torch.get_num_threads()

    def to_parameters(self) -> Parameters:
        """Return the parameters as arrays of their own."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self.named_parameters()}


def check_input(network: Network, features: Features) -> None:
    """Refuse embeddings that a network does not take.

    Raises
    ------
    DataError
        With what to do.
    """
    if network.width != features.shape[1]:
        raise DataError(
            f"embeddings of width {features.shape[1]} for a classifier that takes {network.width}; "
            "embed with the encoder that the federation agreed on"
        )
    if isinstance(features, Residues) and network.attention is None:
        raise DataError(
            "embeddings of residues for an MLP, which takes one per protein; embed again, for example with "
            "`--pooling mean`"
        )
    if network.attention is not None and not isinstance(features, Residues):
        raise DataError(
            "one embedding per protein for light attention, which takes one per residue; embed with "
            "`--pooling residues`"
        )


def reader(network: Network, features: Features) -> Callable[[Tensor], tuple[Any, ...]]:
    """Return what gives the arguments of a network for some proteins, by their places, shape (B,), int64."""
    if not isinstance(features, Residues):
        tensor = as_tensor(features)
        return lambda places: (tensor.index_select(0, places),)
    assert network.attention is not None
    width, gap = network.width, network.attention.gap

    def pack(places: Tensor) -> tuple[Any, ...]:
        lengths = features.lengths[places.numpy()].tolist()
        # torch's memory: a product's bits may depend on where in a cache line its factors begin
        rows = torch.zeros(sum(lengths) + gap * (len(lengths) + 1), width)
        features.read(places.numpy(), rows.numpy(), gap=gap)
        return rows, lengths

    return pack
