"""A site's part of SCAFFOLD: correct each step, and estimate the site's own gradient from what a round of training did.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1 with option II;
the server's part is `fedbio.federation.workflows.scaffold`.
"""

from __future__ import annotations

__all__ = ["ControlVariates", "Received", "Scaffold", "as_array"]

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedbio.client.api import get_site_name
from fedbio.errors import FederationError
from fedbio.federation.workflows.scaffold import CONTROL, COUNTED
from fedbio.tensors import open_file, write_file

if TYPE_CHECKING:
    import torch

ROUND = "round"
"""Name of the tensor with the round, in a site's file of variates; the others have a prefix."""

BEFORE, AFTER = "before/", "after/"


class Received(Protocol):
    """What is needed of an `FLModel` that was received."""

    params: Any
    current_round: Any
    meta: Any


class ControlVariates:
    """A site's part of one round, for any library.

    The site's variate is kept in a file from round to round. The file also has the one before: a script that is killed
    and does a round again, or whose result was not counted, goes on from that.

    Parameters
    ----------
    input_model : FLModel
        What was received. The variates are taken out of its `params`, and the model's own parameters are left.
    learning_rate : float
        Step size of the plain gradient descent with which the site trains; if it changes, its mean over the steps.
    folder : path-like
        Where the site keeps its variate, ``scaffold.safetensors``; each job needs one of its own.
    site : str, optional
        The site's name; by default, ``flare.get_site_name()``.

    Attributes
    ----------
    correction : dict of str to ndarray, float32
        What to add to the gradient of each parameter in each step.

    Raises
    ------
    FederationError
        If no variates came with the model, or the folder is another job's.
    """

    def __init__(
        self, input_model: Received, learning_rate: float, folder: str | os.PathLike[str], *, site: str | None = None
    ) -> None:
        if not learning_rate > 0:
            raise ValueError(f"learning_rate is {learning_rate}, and must be above 0")
        self._rate, self._path = learning_rate, Path(folder) / "scaffold.safetensors"
        self._round, self._site = int(input_model.current_round or 0), site
        params = input_model.params if isinstance(input_model.params, dict) else {}
        # numbers are the places of a list that the script sent
        variates = [name for name in params if isinstance(name, str) and name.startswith(CONTROL)]
        taken = {name: params.pop(name) for name in variates}
        # copies: the script may train in the very arrays that it received
        self._common = {name.removeprefix(CONTROL): as_array(each) for name, each in _flat(taken)}
        self._sent = {name: as_array(each) for name, each in _flat(params) if name in self._common}
        if not self._common:
            raise FederationError(
                "no control variates came with the model; set `scaffold: true` in the job, and make one object per "
                "model that is received"
            )
        own = self._load((input_model.meta or {}).get(COUNTED))
        self._own = {
            name: own[name] if name in own else np.zeros(each.shape, np.float32) for name, each in self._common.items()
        }
        self.correction = {name: each - self._own[name] for name, each in self._common.items()}

    def finish(self, params: Mapping[Any, Any] | Sequence[Any], steps: int) -> dict[str, NDArray[np.float32]]:
        """Keep the site's next variate, and return its change, to be sent beside the parameters.

        The next variate is ``c_i - c + (x - y) / (steps * learning_rate)`` with the received
        parameters x and the trained y.

        Parameters
        ----------
        params : mapping or sequence of ndarray or tensor
            The trained parameters, nested as they were received. What is not in it counts as not trained, and its
            variate stays.
        steps : int
            Steps taken in this round.
        """
        if steps < 1:
            raise ValueError(f"{steps} steps were taken in this round; a variate takes at least one")
        change = {name: np.zeros(each.shape, np.float32) for name, each in self._common.items()}
        for name, trained in _flat(params):
            if name not in self._sent:
                continue
            drift = self._sent[name] - as_array(trained)
            change[name] = (drift / (steps * self._rate) - self._common[name]).astype(np.float32)
        tensors = {BEFORE + name: each for name, each in self._own.items()}
        tensors |= {AFTER + name: each + change[name] for name, each in self._own.items()}
        write_file(self._path, {ROUND: np.array(self._round), **tensors})
        return {CONTROL + name: each for name, each in change.items()}

    def _load(self, counted: Mapping[str, int] | None) -> dict[str, NDArray[np.float32]]:
        """Return the site's variate at the beginning of this round."""
        if not self._path.exists():
            return {}
        tensors = open_file(self._path)
        last = int(tensors.pop(ROUND))
        if last > self._round:
            raise FederationError(
                f"{self._path}: this variate is of round {last}, but the job is in round {self._round}; give each job "
                "a folder of its own, or remove the file"
            )
        done = last < self._round
        if counted is not None:
            site = self._site or get_site_name()
            if site not in counted:
                # the file is of a round that was not counted, or of another job
                return {}
            done = counted[site] == last
        prefix = AFTER if done else BEFORE
        return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


class Scaffold:
    """SCAFFOLD for a torch module that is trained with plain SGD: one object per round.

    Parameters
    ----------
    model : torch.nn.Module
    input_model : FLModel
        What was received. The variates are taken out of its `params`, so that afterwards
        ``model.load_state_dict(input_model.params)`` works as always.
    learning_rate : float
        Of the optimizer, ``torch.optim.SGD`` without momentum: the variate is the mean gradient of the round's steps
        only if each step is that rate times a gradient.
    folder : path-like
        Where the site keeps its variate between rounds; each job needs one of its own.
    site : str, optional
        The site's name; by default, ``flare.get_site_name()``.

    Raises
    ------
    FederationError
        If no variates came with the model, none is of a parameter of `model`, or the folder is another job's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        input_model: Received,
        learning_rate: float,
        folder: str | os.PathLike[str],
        *,
        site: str | None = None,
    ) -> None:
        self._variates = ControlVariates(input_model, learning_rate, folder, site=site)
        self._trained = {
            name: each
            for name, each in model.named_parameters()
            if each.requires_grad and name in self._variates.correction
        }
        if not self._trained:
            raise FederationError(
                "none of the control variates is of a trained parameter of this model; the names that the script sends "
                "must be those of model.named_parameters()"
            )
        self._corrections: dict[str, torch.Tensor] = {}
        self.steps = 0

    def correct(self) -> None:
        """Add the difference of the variates to the gradients: after ``backward``, before the optimizer's step."""
        import torch

        self.steps += 1
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            # made here: a model may be moved to its device, or change its dtype, after this object was made
            correction = self._corrections.get(name)
            if correction is None or correction.device != parameter.device or correction.dtype != parameter.grad.dtype:
                correction = torch.from_numpy(self._variates.correction[name])
                correction = self._corrections[name] = correction.to(parameter.device, parameter.grad.dtype)
            parameter.grad.add_(correction)

    def finish(self, steps: int | None = None) -> dict[str, torch.Tensor]:
        """Keep the site's next variate, and return its change, to be sent beside the parameters.

        Parameters
        ----------
        steps : int, optional
            Steps of the optimizer in this round; by default, the calls of `correct`.
        """
        import torch

        change = self._variates.finish(self._trained, self.steps if steps is None else steps)
        return {name: torch.from_numpy(each) for name, each in change.items()}


def _flat(params: Mapping[Any, Any] | Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all parameters of nested dictionaries and lists, with the names by which they travel."""
    for key, each in params.items() if isinstance(params, Mapping) else enumerate(params):
        if isinstance(each, Mapping | list | tuple):
            yield from _flat(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", each


def as_array(value: Any, dtype: Any = np.float32) -> NDArray[Any]:
    """Return a copy of a tensor or array as an array of `dtype`; None leaves the dtype, but for what numpy lacks."""
    if not isinstance(value, np.ndarray) and hasattr(value, "detach"):
        value = value.detach().cpu()
        if dtype is not None or str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    return np.array(value, dtype)
