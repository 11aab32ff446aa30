"""What a job's algorithm adds to the steps of a trainer that it does not know: FedProx and SCAFFOLD as gradients."""

from __future__ import annotations

__all__ = ["Corrections"]

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbio.client.api import system_info
from fedbio.client.model import FLModel
from fedbio.client.scaffold import Scaffold
from fedbio.client.session import current
from fedbio.errors import FederationError

if TYPE_CHECKING:
    import torch


class Corrections:
    """One round's corrections of gradients, as the job asks for in what it sent.

    FedProx adds ``mu / 2 * |w - w_received|^2`` to the loss (see `fedbio.client.algorithms.proximal_term`); its
    gradient, ``mu * (w - w_received)``, is exact, and needs nothing of the loss. For SCAFFOLD see
    `fedbio.client.scaffold`.

    Parameters
    ----------
    module : torch.nn.Module
        It holds the received parameters.
    model : FLModel
        What was received. Control variates are taken out of its `params`.
    optimizers : sequence of torch.optim.Optimizer
        With which it will be trained.

    Raises
    ------
    FederationError
        If SCAFFOLD is asked for and the optimizer is not one plain SGD, for which alone its variates are right.
    """

    def __init__(self, module: torch.nn.Module, model: FLModel, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        meta = model.meta or {}
        self._mu = float(meta.get("proximal_mu") or 0.0)
        trained = [each for each in module.parameters() if each.requires_grad] if self._mu else []
        self._anchors = [(each, each.detach().clone()) for each in trained]
        self._scaffold: Scaffold | None = None
        if meta.get("scaffold"):
            self._rate, self._optimizer = _plain_rate(optimizers), optimizers[0]
            self._scaffold = Scaffold(module, model, self._rate, Path(system_info()["workspace"]))

    def before_step(self) -> None:
        """Correct the gradients: after ``backward``, before the optimizer's step."""
        for parameter, anchor in self._anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._mu)
        if self._scaffold is not None:
            if _plain_rate([self._optimizer]) != self._rate:
                raise FederationError("SCAFFOLD needs one learning rate for all steps of a round; leave schedulers out")
            self._scaffold.correct()

    def finish(self) -> dict[str, Any]:
        """Return what goes beside the parameters; empty but on the first rank, which alone sends."""
        if self._scaffold is None or current().rank != 0:
            return {}
        return self._scaffold.finish()


def _plain_rate(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Return the learning rate of plain gradient descent."""
    import torch

    groups = list(itertools.chain.from_iterable(each.param_groups for each in optimizers))
    plain = all(not group.get("momentum") and not group.get("weight_decay") for group in groups)
    rates = {float(group["lr"]) for group in groups}
    # trainers wrap optimizers in their own
    kinds = {type(getattr(each, "optimizer", each)) for each in optimizers}
    if len(optimizers) != 1 or kinds != {torch.optim.SGD} or not plain or len(rates) != 1:
        raise FederationError(
            "SCAFFOLD needs one torch.optim.SGD without momentum and weight decay; change the script's optimizer, or "
            "leave `scaffold` out of the job"
        )
    return rates.pop()
