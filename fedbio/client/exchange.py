"""A round as a trainer of Lightning or Hugging Face sees it: load what came, measure it, train it, answer once."""

from __future__ import annotations

__all__ = ["Exchange"]

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbio.client import api
from fedbio.client.algorithms import exclude, restore
from fedbio.client.corrections import Corrections
from fedbio.client.model import FLModel
from fedbio.client.session import current
from fedbio.errors import FederationError
from fedbio.federation.workflows.scaffold import CONTROL
from fedbio.federation.workflows.script import EXCLUDE

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Exchange:
    """What is between a trainer's hooks and the Client API.

    Parameters
    ----------
    strict : bool
        Whether the received names must be exactly the module's; otherwise those that it has are loaded.

    rank : int
        Of this process, for a script that has not called `init`.

    Attributes
    ----------
    task : str
        What is to be done with the model that was loaded: ``"train"``, ``"evaluate"``, or empty if there is nothing to
        answer.
    """

    def __init__(self, strict: bool, rank: int) -> None:
        try:
            current()
        except RuntimeError:
            api.init(rank)
        self.strict = strict
        self.task = ""
        self._metrics: dict[str, float] | None = None
        self._own: dict[str, Any] = {}
        self._no_more = False
        self._model: FLModel | None = None
        self._corrections: Corrections | None = None

    def begin(self, module: torch.nn.Module) -> str:
        """Load the model at hand, or the next one, and return `task`; on all ranks.

        A request for the site's own model is answered here, with what the module holds.

        Raises
        ------
        FederationError
            If the model does not fit the module.
        """
        if self.answered():
            return ""
        self._no_more = False
        self._model = model = api.receive()
        self.task = "" if model is None else api.get_task_name()
        if model is None:
            return ""
        if self.task == "submit_model":
            api.send(FLModel(params=self._shared(module)), clear_cache=False)
            self._forget()
        else:
            if self.task == "evaluate" and not self._own:
                self._own = {name: value.detach().clone() for name, value in module.state_dict().items()}
            self._load(module, model)
        return self.task

    def measured(self, module: torch.nn.Module, metrics: Mapping[str, Any]) -> None:
        """Take what the model that was received is worth: the answer, or what goes with the trained model."""
        found = _numbers(metrics)
        if self.task == "train":
            self._metrics = found
        elif self.task == "evaluate":
            api.send(FLModel(metrics=found))
            # the site's own model is what it trained, and what it may be asked for
            module.load_state_dict(self._own)
            self._forget()

    def train(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Begin to train what `begin` has loaded, with the job's corrections.

        Raises
        ------
        FederationError
            If the model at hand was to be evaluated, and nobody did; or the job's algorithm needs another optimizer.
        """
        if self.task == "evaluate":
            raise FederationError(
                "the job asks to evaluate a model, and the script trains at once; have it validate before it trains"
            )
        if self.task == "train" and self._model is not None:
            self._corrections = Corrections(module, self._model, optimizers)

    def before_step(self) -> None:
        """Correct the gradients as the job asks for; between ``backward`` and each step."""
        if self._corrections is not None:
            self._corrections.before_step()

    def trained(self, module: torch.nn.Module, meta: Mapping[str, Any]) -> None:
        """Send the module's parameters, with the metrics of the model that they came from."""
        assert self._corrections is not None
        params = {**self._shared(module), **self._corrections.finish()}
        # the module keeps its parameters
        api.send(FLModel(params=params, metrics=self._metrics, meta=dict(meta)), clear_cache=False)
        self.task, self._metrics, self._model, self._corrections = "", None, None, None

    def answered(self) -> bool:
        """Whether the task of this turn of the script's loop needs no training any more.

        A loop trains after it has evaluated, also if it was asked for that only.
        """
        session = current()
        return self._no_more and not session.has_model and not session.over

    def _forget(self) -> None:
        self.task, self._metrics, self._own, self._no_more = "", None, {}, True

    def _load(self, module: torch.nn.Module, model: FLModel) -> None:
        params = {name: each for name, each in (model.params or {}).items() if not name.startswith(CONTROL)}
        here = module.state_dict()
        # what stays at the site is in a file, in case that this process is not the one that trained it
        whole = restore(params, here, keep=self._kept()) if self._patterns() and not set(params) - set(here) else params
        unknown, missing = sorted(set(whole) - set(here)), sorted(set(here) - set(whole))
        shapes = [name for name in whole if name in here and tuple(whole[name].shape) != tuple(here[name].shape)]
        problem = ""
        if shapes:
            name = shapes[0]
            problem = f"{name} has shape {tuple(whole[name].shape)} there and {tuple(here[name].shape)} here"
        elif len(unknown) == len(whole):
            there = f"none of its parameters ({', '.join(unknown[:3])}, ...)"
            problem = f"{there} is the module's ({', '.join(missing[:3])})"
        elif self.strict and (unknown or missing):
            problem = f"only one of them has {', '.join((unknown + missing)[:3])}"
        if problem:
            raise FederationError(
                f"the global model does not fit the module that is trained: {problem}; the job's initial model must be "
                "the state_dict of the same module"
            )
        if unknown or missing:
            log.info("model loaded in part without=%s ignored=%s", ",".join(missing), ",".join(unknown))
        import torch  # the module has brought it along

        found = {name: torch.as_tensor(whole[name]) for name in whole if name in here}
        module.load_state_dict(found, strict=False)

    def _shared(self, module: torch.nn.Module) -> dict[str, Any]:
        """Return the module's parameters without those that stay at the site, which go into a file."""
        patterns = self._patterns()
        state = module.state_dict()
        return exclude(state, patterns, keep=self._kept() if current().rank == 0 else None) if patterns else state

    def _patterns(self) -> list[str]:
        return list(((self._model and self._model.meta) or {}).get(EXCLUDE) or ())

    @staticmethod
    def _kept() -> Path:
        return Path(api.system_info()["workspace"]) / "excluded.safetensors"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a trainer's metrics is one number each."""
    found = {}
    for name, value in metrics.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            log.info("metric left out name=%s: it is not one number", name)
    return found
