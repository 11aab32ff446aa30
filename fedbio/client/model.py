"""What a training script receives and sends, and how it becomes what travels.

A script keeps its parameters as torch tensors, NumPy arrays or plain numbers, in a flat dict or in dicts and lists
within each other. On the wire they are NumPy arrays with one name each: the keys on the way to one, joined by dots.
`Form` remembers how a script sent each of them, so that it gets them back likewise.
"""

from __future__ import annotations

__all__ = ["NUM_STEPS", "FLModel", "Form", "ParamsType", "from_script", "to_script"]

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.federation.model import WEIGHT, Parameters, ParamsType
from fedbio.federation.model import FLModel as Travelling

log = logging.getLogger(__name__)

NUM_STEPS = "NUM_STEPS_CURRENT_ROUND"
"""Key in `FLModel.meta` under which scripts written for NVIDIA FLARE say their weight."""

Path = tuple[str | int, ...]
"""Keys of dicts and places in lists on the way to one parameter."""

Kind = Literal["torch", "numpy"]
"""How parameters come that the script has never sent."""


class FLModel:
    """A model on its way to or from a training script.

    Parameters
    ----------
    params_type : ParamsType or str, optional
        ``"FULL"``: `params` are a whole model (the default); ``"DIFF"``: what to add to the one that was received.
    params : dict, optional
        Torch tensors, NumPy arrays or numbers by name; values may be dicts or lists of such.
    optimizer_params : dict, optional
        State of an optimizer. It stays at the site, since no workflow averages it: a script keeps it itself from round
        to round, in memory or in ``system_info()["workspace"]``. What is no arrays by name, such as the ``state_dict``
        of torch's optimizers, does not even reach the site's process.
    metrics : dict of str to float, optional
        Numbers that describe the model that was received, or the training.
    start_round, current_round, total_rounds : int, optional
        Rounds count from 0.
    meta : dict, optional
        JSON values. ``"NUM_STEPS_CURRENT_ROUND"`` or ``"weight"`` is the model's weight in the average; without either
        it is the number of examples that the site has registered.

    Raises
    ------
    ValueError
        If a type of parameters is named but there are none, or a round is negative.
    TypeError
        If `metrics` or `meta` is no dict.
    """

    def __init__(
        self,
        params_type: ParamsType | str | None = None,
        params: Any = None,
        optimizer_params: Any = None,
        metrics: dict[str, Any] | None = None,
        start_round: int | None = 0,
        current_round: int | None = None,
        total_rounds: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if params_type is None:
            kind = None if params is None else ParamsType.FULL
        else:
            kind = ParamsType(params_type)
            if params is None:
                raise ValueError(f"params_type is {kind}, but there are no params")
        for name, value in (("metrics", metrics), ("meta", meta)):
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, not {type(value).__name__}")
        for name, number in (("start", start_round), ("current", current_round), ("total", total_rounds)):
            if number is not None and number < 0:
                raise ValueError(f"{name}_round is {number}; rounds count from 0")
        self.params_type = kind
        self.params = params
        self.optimizer_params = optimizer_params
        self.metrics = metrics
        self.start_round, self.current_round, self.total_rounds = start_round, current_round, total_rounds
        self.meta: dict[str, Any] = {} if meta is None else meta

    def __repr__(self) -> str:
        count = 0 if self.params is None else len(self.params)
        kind = self.params_type and self.params_type.value
        return (
            f"FLModel(params_type={kind}, params={count} entries, metrics={self.metrics}, "
            f"current_round={self.current_round}, total_rounds={self.total_rounds}, meta={sorted(self.meta)})"
        )


@dataclass
class Form:
    """How a script keeps each of its parameters.

    Parameters
    ----------
    default : callable
        Returns how parameters come that were never sent.
    kinds : dict of str to str
        By name: ``"numpy"``, ``"number"``, ``"torch"``, or ``"torch."`` with a dtype that NumPy lacks.
    paths : dict of str to tuple
    told : bool
        Whether it was said that the script's `optimizer_params` are left out.
    """

    default: Any = None
    kinds: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    told: bool = False

    def remember(self, name: str, kind: str, path: Path) -> None:
        """Note how the script has sent one parameter."""
        self.kinds[name] = kind
        self.paths[name] = path

    def kind(self, name: str) -> str:
        """Return as what a parameter shall come."""
        if name in self.kinds:
            return self.kinds[name]
        return str(self.default()) if self.default is not None else _usual()


def from_script(model: FLModel, form: Form | None = None) -> Travelling:
    """Return what travels; arrays in memory of the processor are not copied.

    Parameters
    ----------
    model : FLModel
    form : Form, optional
        Filled with how the script keeps its parameters.

    Raises
    ------
    TypeError
        If something is neither a tensor, an array nor a number, or `meta` is no JSON; with its name.
    ValueError
        If two parameters have the same name once their keys are joined.
    """
    metrics = {}
    for name, value in (model.metrics or {}).items():
        try:
            metrics[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metrics[{name!r}] is a {type(value).__name__}; expected a number") from error
    try:
        meta = msgspec.to_builtins(model.meta, enc_hook=_plain, str_keys=True)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(f"meta: {error}; expected values that JSON has") from error
    if NUM_STEPS in meta:
        meta[WEIGHT] = meta[NUM_STEPS]
    if (weight := meta.get(WEIGHT)) is not None and not (
        isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0
    ):
        raise ValueError(f"the weight in meta is {weight!r}; expected a number of examples or steps")
    return Travelling(
        params=_flat(model.params, "params", form),
        optimizer_params=_of_optimizer(model.optimizer_params, form),
        metrics=metrics,
        meta=meta,
        params_type=model.params_type or ParamsType.FULL,
        start_round=model.start_round or 0,
        current_round=model.current_round or 0,
        total_rounds=1 if model.total_rounds is None else model.total_rounds,
    )


def to_script(model: Travelling, form: Form) -> FLModel:
    """Return a model as a script likes it; arrays that may be written to are not copied."""
    params = _nested(model.params, "params", form)
    return FLModel(
        params_type=model.params_type if params is not None else None,
        params=params,
        optimizer_params=_nested(model.optimizer_params, "optimizer_params", form),
        metrics=dict(model.metrics) or None,
        start_round=model.start_round,
        current_round=model.current_round,
        total_rounds=model.total_rounds,
        meta=dict(model.meta),
    )


def _of_optimizer(state: Any, form: Form | None) -> Parameters:
    """Return the state of an optimizer, or nothing if it is more than arrays by name: nobody waits for it."""
    try:
        return _flat(state, "optimizer_params", form)
    except (TypeError, ValueError) as error:
        if form is None or not form.told:
            log.warning("optimizer_params stay in the script, no workflow averages them (%s)", error)
        if form is not None:
            form.told = True
        return {}


def _usual() -> Kind:
    return "torch" if "torch" in sys.modules else "numpy"


def _plain(value: Any) -> Any:
    """Return a tensor's or an array's one number, for `meta`."""
    if hasattr(value, "item"):
        return value.item()
    raise NotImplementedError(f"a {type(value).__name__} cannot travel in meta")


def _flat(tree: Any, what: str, form: Form | None) -> Parameters:
    found: Parameters = {}
    if tree is None:
        return found
    if not isinstance(tree, Mapping | list | tuple):
        raise TypeError(f"{what} must be a dict of arrays by name, not {type(tree).__name__}")
    for path, value in _leaves(tree, what, ()):
        name = ".".join(map(str, path))
        if name in found:
            raise ValueError(f"{what}: two entries are called {name!r} once their keys are joined by dots")
        found[name], kind = _array(value, f"{what}[{name!r}]")
        if form is not None:
            form.remember(f"{what}/{name}", kind, path)
    return found


def _leaves(tree: Any, what: str, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise TypeError(f"{what}: key {key!r} is a {type(key).__name__}; names must be text")
            yield from _leaves(value, what, (*path, key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, what, (*path, number))
    else:
        yield path, tree


def _array(value: Any, what: str) -> tuple[NDArray[Any], str]:
    """Return a parameter as an array, a view where that is possible, and what it was."""
    kind = "numpy"
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        kind, value = _tensor(value)
    elif isinstance(value, bool | int | float):
        kind = "number"
    elif not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a tensor, an array or a number")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{what} has dtype {array.dtype}; expected booleans, integers or floats of at most 64 bits")
    return array, kind


def _tensor(tensor: Any) -> tuple[str, NDArray[Any]]:
    torch = sys.modules["torch"]
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    try:
        return "torch", tensor.cpu().resolve_conj().resolve_neg().numpy()
    except TypeError:
        # bfloat16 and the 8-bit floats: every value of theirs is one of float32
        return str(tensor.dtype), tensor.float().cpu().numpy()


def _nested(flat: Parameters, what: str, form: Form) -> Any:
    """Return parameters in the dicts and lists in which the script sent them."""
    if not flat:
        return None
    tree: dict[str | int, Any] = {}
    for name, array in flat.items():
        known = f"{what}/{name}"
        branch, path = tree, form.paths.get(known, (name,))
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = _value(array, form.kind(known))
    return _lists(tree)


def _lists(tree: Any) -> Any:
    """Turn dicts whose keys are places into lists."""
    if not isinstance(tree, dict):
        return tree
    if all(isinstance(key, int) for key in tree):
        return [_lists(tree[key]) for key in sorted(tree)]
    return {key: _lists(value) for key, value in tree.items()}


def _value(array: NDArray[Any], kind: str) -> Any:
    if kind == "number":
        return array.item() if array.ndim == 0 else array
    if not (array.flags.writeable and array.flags.aligned):
        array = array.copy()
    if kind == "numpy":
        return array
    import torch  # only a script that uses torch comes here

    tensor = torch.from_numpy(array)
    return tensor if kind == "torch" else tensor.to(getattr(torch, kind.partition(".")[2]))
