"""Train one part of a network whose other part is at another site.

The part with the features computes the activations of the cut layer and sends them; the part with the labels goes on
from there, and sends back the gradients of its loss with respect to them, with which the first part's backward pass
begins. The gradients of all parameters are those of the whole network: the chain rule, cut at one place. Gupta & Raskar
2018, "Distributed learning of deep neural network over multiple agents"; Vepakomma et al. 2018, "Split learning for
health: Distributed deep learning without sharing raw patient data".
"""

from __future__ import annotations

__all__ = ["Channel", "Rows", "train_bottom", "train_top"]

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FederationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Arrays = dict[str, NDArray[Any]]

ALONE = "activations"
"""Name of the activations of a part that returns one tensor."""


class Rows(NamedTuple):
    """What the functions `features` and `labels` of a script return: ids, and a tensor with one row for each."""

    ids: Sequence[str]
    values: Tensor


class Channel(Protocol):
    """Exchanges messages with the other site, in turns."""

    def send(self, number: int, items: Arrays) -> None:
        """Send a message."""

    def receive(self, number: int) -> Arrays:
        """Wait for the other site's message."""


def train_bottom(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, features: Tensor, channel: Channel, step: int
) -> None:
    """Train the part with the features on one batch.

    Parameters
    ----------
    module : Module
        Returns the activations of the cut: a tensor, or a dict of tensors, of (B, ...) each.
    optimizer : Optimizer
        Of its parameters.
    features : Tensor, shape (B, ...)
    channel : Channel
    step : int
        The batch's number in the session.

    Raises
    ------
    FederationError
        If the activations cannot travel, or the gradients that come do not fit them or are not finite.
    """
    import torch

    optimizer.zero_grad(set_to_none=True)
    activations = _named(module(features))
    channel.send(2 * step, {name: _array(name, value) for name, value in activations.items()})
    gradients = channel.receive(2 * step + 1)
    floating = {name: value for name, value in activations.items() if value.is_floating_point()}
    if gradients.keys() != floating.keys():
        raise FederationError(f"gradients came for {sorted(gradients)}, expected them for {sorted(floating)}")
    found = {name: _tensor(name, gradients[name], value) for name, value in floating.items()}
    # a part that is frozen has nothing to learn from them
    wanted = [name for name, value in floating.items() if value.requires_grad]
    if wanted:
        torch.autograd.backward([floating[name] for name in wanted], [found[name] for name in wanted])
        optimizer.step()


def train_top(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any, Tensor], Tensor],
    labels: Tensor,
    channel: Channel,
    step: int,
) -> float:
    """Train the part with the labels on one batch.

    Parameters
    ----------
    module : Module
        Takes what the other part returns: a tensor, or a dict of tensors.
    optimizer : Optimizer
        Of its parameters.
    loss : callable
        Given the module's output and the labels, returns one number.
    labels : Tensor, shape (B, ...)
    channel : Channel
    step : int
        The batch's number in the session.

    Returns
    -------
    float
        The loss on the batch, before the step.

    Raises
    ------
    FederationError
        If the activations that come do not fit the labels or are not finite, or the loss is not.
    """
    import torch

    activations = {}
    for name, array in channel.receive(2 * step).items():
        if array.ndim == 0 or len(array) != len(labels):
            raise FederationError(f"{name} of shape {array.shape} came for a batch of {len(labels)} rows")
        activations[name] = _leaf(name, array, labels.device)
    if not activations:
        raise FederationError("no activations came")
    optimizer.zero_grad(set_to_none=True)
    value = loss(module(activations[ALONE] if activations.keys() == {ALONE} else activations), labels)
    if value.numel() != 1 or not torch.isfinite(value).all():
        raise FederationError(f"the loss of batch {step} is {value.detach()}, not one finite number")
    value.backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, leaf in activations.items():
        if leaf.requires_grad:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients[name] = _array(name, gradient)
    # the other site goes on while this one makes its step
    channel.send(2 * step + 1, gradients)
    optimizer.step()
    return float(value.detach())


def _named(output: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    named = {ALONE: output} if isinstance(output, torch.Tensor) else output
    if not isinstance(named, Mapping) or not all(isinstance(each, torch.Tensor) for each in named.values()):
        raise FederationError("the bottom part must return a tensor, or a dict of tensors by name")
    return dict(named)


def _array(name: str, value: Tensor) -> NDArray[Any]:
    try:
        array: NDArray[Any] = value.detach().cpu().contiguous().numpy()
    except TypeError as error:
        raise FederationError(f"{name} of {value.dtype} cannot travel; cut the network where it is float32") from error
    return array


def _tensor(name: str, array: NDArray[Any], like: Tensor) -> Tensor:
    """Return gradients that came as a tensor, if they can be those of `like`."""
    import torch

    found = torch.from_numpy(array)
    if found.shape != like.shape or found.dtype != like.dtype:
        raise FederationError(
            f"gradients of {name} of {found.dtype} and shape {tuple(found.shape)}, expected {like.dtype} and "
            f"{tuple(like.shape)}"
        )
    _check_finite(f"gradients of {name}", array)
    return found.to(like.device)


def _leaf(name: str, array: NDArray[Any], device: torch.device) -> Tensor:
    import torch

    leaf = torch.from_numpy(array).to(device)
    if leaf.is_floating_point():
        _check_finite(name, array)
        leaf.requires_grad_()
    return leaf


def _check_finite(what: str, array: NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise FederationError(f"{what} that came are not finite")
