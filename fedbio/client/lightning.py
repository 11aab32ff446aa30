"""The Client API for Lightning 2: `patch` a trainer, and its ``validate`` and ``fit`` take part in a federation.

The usual script::

    import fedbio.client.lightning as flare

    flare.patch(trainer)
    while flare.is_running():
        flare.receive()
        trainer.validate(model, datamodule=data)  # the global model; its metrics choose the best round
        trainer.fit(model, datamodule=data)       # trains it and sends the result

Names and meanings are those of NVIDIA FLARE's ``nvflare.client.lightning``.
"""

from __future__ import annotations

__all__ = [
    "AnalyticsDataType",
    "ClientLogger",
    "FLCallback",
    "FLModel",
    "ParamsType",
    "RestoreState",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "logger",
    "patch",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedbio import __version__
from fedbio.client.analytics import AnalyticsDataType
from fedbio.client.api import (
    evaluate,
    get_config,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
    train,
)
from fedbio.client.exchange import Exchange
from fedbio.client.model import FLModel, ParamsType

# Lightning comes under two names, each with classes of its own, and takes seconds to load: a script has one of them
if TYPE_CHECKING:
    import torch

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning" in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.trainer.states import TrainerFn
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.trainer.states import TrainerFn

META = "__fl_meta__"
"""Attribute of a module, a dict: what goes to the server as the model's meta."""


def patch(
    trainer: Trainer, restore_state: bool = True, load_state_dict_strict: bool = True, update_fit_loop: bool = True
) -> None:
    """Make a trainer take part: it loads global models, and sends what it trains and measures.

    ``trainer.validate`` measures the model that was received, ``trainer.fit`` trains it; a task that asks only for the
    one is answered by it, and the other does nothing. Outside of tasks, such as after the last round, the trainer does
    what it always does. The weight of the result is the number of examples that the site has registered, unless the
    module's attribute ``__fl_meta__``, a dict, has a ``"NUM_STEPS_CURRENT_ROUND"`` or ``"weight"``.

    Parameters
    ----------
    trainer : lightning.pytorch.Trainer
        It corrects gradients by itself where a job asks for FedProx or SCAFFOLD (for this, with plain SGD).
    restore_state : bool
        Whether the states of optimizers, learning rate schedulers and the scaler of mixed precision live on from round
        to round at this site.
    load_state_dict_strict : bool
        Whether the global model must have exactly the module's parameters.
    update_fit_loop : bool
        Whether every round trains for the trainer's ``max_epochs`` and ``max_steps``. Otherwise they are those of all
        rounds together.

    Raises
    ------
    SettingsError
        If no site has started this script.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(each, FLCallback) for each in callbacks):
        callbacks.append(FLCallback(trainer.global_rank, load_state_dict_strict, update_fit_loop))
    if restore_state and not any(isinstance(each, RestoreState) for each in callbacks):
        callbacks.append(RestoreState())


class FLCallback(Callback):
    """Exchanges models with the site at the hooks of a trainer; see `patch`."""

    def __init__(self, rank: int = 0, load_state_dict_strict: bool = True, update_fit_loop: bool = True) -> None:
        super().__init__()
        self._exchange = Exchange(load_state_dict_strict, rank)
        self._update_fit_loop = update_fit_loop
        self._per_round: tuple[int, int] | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not the validation within a fit: that measures the site's own model
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._exchange.begin(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._exchange.measured(pl_module, trainer.callback_metrics)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange.begin(pl_module)
        self._exchange.train(pl_module, trainer.optimizers)
        loop = trainer.fit_loop
        if self._per_round is None:
            self._per_round = (-1 if loop.max_epochs is None else loop.max_epochs, loop.max_steps)
        else:
            # a sanity check of the data once is enough
            trainer.num_sanity_val_steps = 0
        epochs, steps = self._per_round
        if self._exchange.answered():
            # a loop at its bound ends before it begins
            trainer.num_sanity_val_steps = 0
            loop.max_epochs = trainer.current_epoch
        elif self._update_fit_loop:
            loop.max_epochs = epochs if epochs < 0 else trainer.current_epoch + epochs
            loop.epoch_loop.max_steps = steps if steps < 0 else trainer.global_step + steps
        else:
            loop.max_epochs = epochs

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # after the unscaling of mixed precision, before clipping
        self._exchange.before_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._exchange.task == "train":
            meta = getattr(pl_module, META, {})
            if not isinstance(meta, dict):
                raise TypeError(f"{META} of {type(pl_module).__name__} is a {type(meta).__name__}, and must be a dict")
            self._exchange.trained(pl_module, meta)


class RestoreState(Callback):
    """Keeps the states of optimizers, schedulers and scaler from one ``fit`` to the next, which makes them anew."""

    def __init__(self) -> None:
        super().__init__()
        self._optimizers: list[dict[str, Any]] = []
        self._schedulers: list[dict[str, Any]] = []
        self._scaler: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=False):
            optimizer.load_state_dict(state)
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=False):
            config.scheduler.load_state_dict(state)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self._scaler is not None:
            scaler.load_state_dict(self._scaler)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # these belong to this fit alone, and are not copied
        self._optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self._schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scaler = None if scaler is None else scaler.state_dict()


class ClientLogger(Logger):
    """Sends what a module logs to the server: ``Trainer(logger=flare.ClientLogger())``."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self._prefix = prefix

    @property
    def name(self) -> str:
        return "fedbio"

    @property
    def version(self) -> str:
        return __version__

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send numbers; on other ranks than the first do nothing."""
        for key, value in metrics.items():
            log(f"{self._prefix}-{key}" if self._prefix else key, value, "METRIC", global_step=step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: settings of the script stay at the site."""


logger = ClientLogger
