"""What a training script adds to its loss, its steps or its parameters for FedProx, SCAFFOLD and FedBN.

::

    loss = criterion(model(x), y) + proximal_term(model, input_model.params, mu)  # FedProx

    scaffold = Scaffold(model, input_model, learning_rate, folder)                # SCAFFOLD, once per round
    ...
    loss.backward(); scaffold.correct(); optimizer.step()
    ...
    flare.send(flare.FLModel(params={**model.state_dict(), **scaffold.finish()}))

    model.load_state_dict(restore(input_model.params, model.state_dict()))        # FedBN
    ...
    flare.send(flare.FLModel(params=exclude(model.state_dict(), input_model.meta["exclude"])))

Torch is imported by what needs it, when it is called.
"""

from __future__ import annotations

__all__ = ["ControlVariates", "Scaffold", "exclude", "proximal_term", "restore"]

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedbio.client.scaffold import ControlVariates, Scaffold, as_array
from fedbio.errors import FederationError, SettingsError
from fedbio.tensors import open_file, write_file

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


def proximal_term(
    model: torch.nn.Module, reference: Mapping[str, torch.Tensor | NDArray[Any]], mu: float
) -> torch.Tensor:
    """Return what FedProx adds to a site's loss, so that it does not drift far from the common model.

    ``mu / 2`` times the squared L2 distance of the trained parameters to those that the site received: Li et al. 2020,
    "Federated Optimization in Heterogeneous Networks", Algorithm 2.

    Parameters
    ----------
    model : torch.nn.Module
    reference : mapping of str to tensor or ndarray
        The parameters of the model as it was received, under the names of `model`. What is not in it, because it stays
        at the site, adds nothing. Tensors on the model's device save a copy in each step.
    mu : float
        The job's setting, ``input_model.meta["proximal_mu"]``; 0 is FedAvg.

    Returns
    -------
    torch.Tensor, shape (), of the parameters' dtype and on their device

    Raises
    ------
    FederationError
        If no parameter is in `reference`, or one has another shape there.
    """
    import torch

    terms = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name not in reference:
            continue
        anchor = torch.as_tensor(reference[name]).to(parameter.device, parameter.dtype)
        if anchor.shape != parameter.shape:
            raise FederationError(
                f"proximal_term: parameter {name!r} has shape {list(parameter.shape)}, the reference "
                f"{list(anchor.shape)}; pass the parameters of the model that was received"
            )
        terms.append((parameter - anchor).square().sum())
    if not terms:
        raise FederationError(
            "proximal_term: the reference has none of the model's trained parameters; pass the parameters of the model "
            "that was received, under the names of model.named_parameters()"
        )
    return mu / 2 * torch.stack(terms).sum()


def exclude(
    params: Mapping[str, Value], patterns: Sequence[str], *, keep: str | os.PathLike[str] | None = None
) -> dict[str, Value]:
    """Return parameters without those that stay at the site, as with FedBN.

    Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", has all of batch
    normalization stay: parameters and running statistics.

    Parameters
    ----------
    params : mapping of str to tensor or ndarray
    patterns : sequence of str
        Of names, as in a shell: ``"*.bn*"``. The job's own are ``input_model.meta["exclude"]``.
    keep : path-like, optional
        A safetensors file for those that stay, from which `restore` takes them if the script was killed.

    Raises
    ------
    SettingsError
        If a pattern fits no name, or nothing would be left to send.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in params):
            raise SettingsError(f"exclude: {pattern!r} fits no parameter; the names are {', '.join(sorted(params))}")
    shared = {
        name: each for name, each in params.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not shared:
        raise SettingsError(f"exclude: {', '.join(patterns)} leaves no parameter that could be sent")
    if keep is not None:
        write_file(keep, {name: as_array(each, None) for name, each in params.items() if name not in shared})
    return shared


def restore(
    received: Mapping[str, Any], own: Mapping[str, Any], *, keep: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Return what was received, completed by what stays at the site.

    Parameters
    ----------
    received : mapping of str to tensor or ndarray
    own : mapping of str to tensor or ndarray
        All parameters of the site's model, such as ``model.state_dict()``.
    keep : path-like, optional
        The file that `exclude` wrote; it counts more than `own`. In the first round there is none yet.

    Raises
    ------
    FederationError
        If something was received that the site's model lacks.
    """
    if unknown := sorted(received.keys() - own.keys()):
        raise FederationError(f"restore: {unknown[0]!r} was received, but this site's model has no such parameter")
    kept = open_file(keep) if keep is not None and Path(keep).exists() else {}
    whole = {}
    for name, each in own.items():
        if name in received:
            whole[name] = received[name]
        else:
            whole[name] = _like(each, kept[name]) if name in kept else each
    return whole


def _like(example: Any, value: NDArray[Any]) -> Any:
    """Return an array as what `example` is: a tensor, or an array of its own."""
    if isinstance(example, np.ndarray):
        return np.array(value, example.dtype)
    import torch

    return torch.from_numpy(np.array(value)).to(example.device, example.dtype)
