"""What the server does with the sites' mean change: a step of an optimizer of its own.

FedAdam, FedYogi and FedAdagrad are Algorithm 2 of Reddi et al. 2021, "Adaptive Federated Optimization": without
correction of bias, and with the second moment beginning at the square of `tau`. FedAvgM is that of Hsu et al. 2019,
"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification".
"""

from __future__ import annotations

__all__ = ["ServerOptimization", "in_dtypes_of", "is_trained"]

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FederationError
from fedbio.federation.model import Parameters
from fedbio.settings_jobs import ServerOptimizer
from fedbio.tensors.check import is_finite
from fedbio.tensors.combine import BLOCK_VALUES

Array = NDArray[Any]

FIRST, SECOND = "first_moment/", "second_moment/"
"""Before the names of the model's tensors, among those of the state."""

STATE_DTYPE = np.dtype("<f4")

STATISTICS = ("running_mean", "running_var")
"""What torch calls the running statistics of normalization: floating-point, but measured and not trained."""


def is_trained(name: str, dtype: np.dtype[Any]) -> bool:
    """Return whether a tensor is a parameter that gradients change, as far as name and dtype tell."""
    return dtype.kind == "f" and name.rpartition(".")[2] not in STATISTICS


def in_dtypes_of(model: Parameters, combined: Parameters) -> Parameters:
    """Return what was made of several models in the dtypes of one of them; integers are rounded.

    Means are float32, whatever was averaged; the sites get a model in the dtypes in which they made it.

    Raises
    ------
    FederationError
        If a value is too large for its dtype.
    """
    cast: Parameters = {}
    for name, values in combined.items():
        dtype = model[name].dtype
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                cast[name] = values.astype(dtype, copy=False)
            if not is_finite(cast[name]) and is_finite(values):
                raise FederationError(f"values of {name!r} are beyond what {dtype} holds; look at the sites' logs")
        else:
            cast[name] = values >= 0.5 if dtype.kind == "b" else _within(_whole(name, values), dtype)
    return cast


class ServerOptimization:
    """Takes steps with the sites' mean change as the negative gradient.

    Parameters
    ----------
    settings : ServerOptimizer
    """

    def __init__(self, settings: ServerOptimizer) -> None:
        self.settings = settings
        adaptive = settings.name != "sgd"
        self._second: Callable[[Array, Array], Array] | None = getattr(self, f"_{settings.name}") if adaptive else None
        self._begins = {FIRST: 0.0} if adaptive or settings.momentum else {}
        if adaptive:
            self._begins[SECOND] = settings.tau**2

    def step(self, model: Parameters, change: Parameters, state: Parameters | None) -> tuple[Parameters, Parameters]:
        """Return the next model and the next state.

        Parameters
        ----------
        model : dict of str to ndarray
        change : dict of str to ndarray
            What the sites' mean is away from the model, in any dtypes. A tensor that is not in it, which a filter held
            back, stays as it was; so does its state.
        state : dict of str to ndarray, or None
            What the last step returned, to the bit; None for the first one.

        Returns
        -------
        model : dict of str to ndarray
            In the order and the dtypes of `model`. Integers get the change, rounded, and running statistics of
            normalization get it as it is: a step along a ratio of moments could make a variance negative.
        state : dict of str to ndarray, dtype=np.float32
            Moments of the trained tensors. It is to be saved with the model.

        Raises
        ------
        FederationError
            If the new values are not finite in their dtypes, or `state` is not of this model and these settings.
        """
        if unknown := sorted(change.keys() - model.keys()):
            raise ValueError(f"the change has tensors that the model lacks: {', '.join(unknown)}")
        for name, each in change.items():
            if each.shape != model[name].shape:
                raise ValueError(f"the change of {name!r} has shape {each.shape}, the model has {model[name].shape}")
        state = self._checked(model, state)
        stepped: Parameters = {}
        moments = dict(state)
        for name, values in model.items():
            if name not in change:
                stepped[name] = values
            elif values.dtype.kind != "f":
                stepped[name] = _counted(name, values, change[name])
            elif is_trained(name, values.dtype):
                before = [state[slot + name] for slot in self._begins]
                stepped[name], *after = self._moved(values, change[name], before)
                moments |= {slot + name: moment for slot, moment in zip(self._begins, after, strict=True)}
            else:
                with np.errstate(over="ignore"):
                    stepped[name] = np.add(values, change[name], dtype=np.float64).astype(values.dtype)
        for name, tensor in (stepped | moments).items():
            if not is_finite(tensor):
                raise FederationError(
                    f"the step of the server's optimizer {self.settings.name} makes values of {name!r} that are not "
                    "finite; lower its learning_rate, or refuse changes that are too long with norm_bound"
                )
        return stepped, moments

    def _checked(self, model: Parameters, state: Parameters | None) -> Parameters:
        """Return the state, or the one to begin with."""
        wanted = {
            slot + name: (values.shape, begin)
            for slot, begin in self._begins.items()
            for name, values in model.items()
            if is_trained(name, values.dtype)
        }
        if state is None:
            return {key: np.full(shape, begin, STATE_DTYPE) for key, (shape, begin) in wanted.items()}
        wrong = sorted(
            key
            for key in wanted.keys() | state.keys()
            if key not in state or key not in wanted or state[key].shape != wanted[key][0]
        )
        if wrong:
            raise FederationError(
                f"the saved state of the server's optimizer does not fit the model and optimizer {self.settings.name} "
                f"(first difference: {wrong[0]!r}); a job goes on with the settings that it began with: set them back, "
                "or start in a new workspace"
            )
        return state

    def _moved(self, values: Array, change: Array, before: list[Array]) -> list[Array]:
        """Return the new values of one tensor, and its new moments."""
        after = [np.empty(values.shape, values.dtype), *(np.empty(values.shape, STATE_DTYPE) for _ in before)]
        flat = [each.reshape(-1) for each in (values, change, *before)]
        out = [each.reshape(-1) for each in after]
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, values.size, BLOCK_VALUES):
                part = slice(begin, begin + BLOCK_VALUES)
                stepped = self._block(*(each[part].astype(np.float64) for each in flat))
                for target, block in zip(out, stepped, strict=True):
                    target[part] = block
        return after

    def _block(self, values: Array, change: Array, *moments: Array) -> list[Array]:
        settings = self.settings
        if self._second is not None:
            first, second = moments
            first = settings.beta_1 * first + (1 - settings.beta_1) * change
            second = self._second(second, change * change)
            step = settings.learning_rate * first / (np.sqrt(second) + settings.tau)
            return [values + step, first, second]
        if moments:
            first = settings.momentum * moments[0] + change
            return [values + settings.learning_rate * first, first]
        return [values + settings.learning_rate * change]

    def _adagrad(self, second: Array, square: Array) -> Array:
        return second + square

    def _adam(self, second: Array, square: Array) -> Array:
        return self.settings.beta_2 * second + (1 - self.settings.beta_2) * square

    def _yogi(self, second: Array, square: Array) -> Array:
        return np.asarray(second - (1 - self.settings.beta_2) * square * np.sign(second - square))


def _counted(name: str, values: Array, change: Array) -> Array:
    """Add a change to integers or truth values, rounded and kept within what their dtype holds."""
    if values.dtype.kind == "b":
        return np.asarray(values + change.astype(np.float64) >= 0.5)
    total = values.astype(np.int64) + _whole(name, change)
    return _within(total, values.dtype)


def _whole(name: str, values: Array) -> NDArray[np.int64]:
    wide = values.astype(np.float64)
    # beyond it float64 does not hold every integer, and a cast to int64 may not be defined
    if not (np.abs(wide) < 2**53).all():
        raise FederationError(f"the mean of the integers {name!r} is off by 2**53 or more; look at the sites' logs")
    return np.rint(wide).astype(np.int64)


def _within(values: NDArray[np.int64], dtype: np.dtype[Any]) -> Array:
    limits = np.iinfo(dtype)
    return np.asarray(np.clip(values, limits.min, min(limits.max, np.iinfo(np.int64).max)).astype(dtype))
