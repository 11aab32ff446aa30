"""The Client API for Hugging Face: `patch` a ``Trainer``, and ``evaluate`` and ``train`` take part in a federation.

The usual script::

    import fedbio.client.huggingface as flare

    flare.patch(trainer)
    while flare.is_running():
        flare.receive()
        trainer.evaluate()  # the global model; its metrics choose the best round: `selection: {metric: eval_accuracy}`
        trainer.train()     # trains it and sends the result

Names and meanings are those of NVIDIA FLARE's ``nvflare.client.hf``, and `fedbio.client.hf` is this module as well.
"""

from __future__ import annotations

__all__ = [
    "AnalyticsDataType",
    "ClientLogger",
    "FLCallback",
    "FLModel",
    "ParamsType",
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
    "patch",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

import functools
from typing import Any

from torch.nn import Module
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

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

META = "__fl_meta__"
"""Attribute of a model, a dict: what goes to the server as the model's meta."""

_OF_THE_MACHINE = ("_runtime", "_per_second", "_preparation_time", "total_flos", "epoch")
"""Endings of what a trainer measures beside the model."""


class FLCallback(TrainerCallback):
    """Takes the global model before a training, and sends what it has become after it.

    Alone, ``Trainer(callbacks=[FLCallback()])``, it serves a script that only trains. What measures models needs
    `patch`: a trainer tells its callbacks of an evaluation only when it is over.

    Parameters
    ----------
    load_state_dict_strict : bool
        Whether the global model must have exactly the model's parameters.
    """

    def __init__(self, load_state_dict_strict: bool = True) -> None:
        self._strict = load_state_dict_strict
        self._exchange: Exchange | None = None

    def exchange(self, args: TrainingArguments) -> Exchange:
        """Return this script's exchange with its site."""
        if self._exchange is None:
            self._exchange = Exchange(self._strict, args.process_index)
        return self._exchange

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        exchange = self.exchange(args)
        exchange.begin(kwargs["model"])
        exchange.train(kwargs["model"], [kwargs["optimizer"]])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.exchange(args).before_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, exchange = kwargs["model"], self.exchange(args)
        if exchange.task == "train":
            meta = getattr(model, META, {})
            if not isinstance(meta, dict):
                raise TypeError(f"{META} of {type(model).__name__} is a {type(meta).__name__}, and must be a dict")
            exchange.trained(model, meta)


def patch(trainer: Trainer, restore_state: bool = True, load_state_dict_strict: bool = True) -> Trainer:
    """Make a trainer take part: it loads global models, and sends what it trains and measures.

    ``trainer.evaluate`` measures the model that was received, ``trainer.train`` trains it; a task that asks only for
    the one is answered by it, and the other does nothing. Outside of tasks, such as after the last round, the trainer
    does what it always does. Each round trains for the arguments' ``num_train_epochs`` or ``max_steps``, with the
    learning rate's schedule from its beginning. The weight of the result is the number of examples that the site has
    registered, unless the model's attribute ``__fl_meta__``, a dict, has a ``"NUM_STEPS_CURRENT_ROUND"`` or
    ``"weight"``.

    Parameters
    ----------
    trainer : transformers.Trainer
        It corrects gradients by itself where a job asks for FedProx or SCAFFOLD (for this, with ``optim="sgd"`` and a
        constant schedule).
    restore_state : bool
        Whether the optimizer's state lives on from round to round at this site.
    load_state_dict_strict : bool
        Whether the global model must have exactly the model's parameters.

    Returns
    -------
    transformers.Trainer
        The same one.

    Raises
    ------
    SettingsError
        If no site has started this script.
    """
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(each, _Patched) for each in callbacks):
        return trainer
    trainer.remove_callback(FLCallback)
    callback = _Patched(load_state_dict_strict)
    exchange = callback.exchange(trainer.args)
    trainer.add_callback(callback)
    evaluate, train, given = trainer.evaluate, trainer.train, trainer.optimizer is not None
    within = False

    @functools.wraps(evaluate)
    def evaluate_global(*args: Any, **kwargs: Any) -> dict[str, float]:
        nonlocal within
        # within a training it measures the site's own model; for several data sets it calls itself
        if within or trainer.is_in_train:
            return evaluate(*args, **kwargs)
        within = True
        try:
            exchange.begin(_module(trainer))
            metrics = evaluate(*args, **kwargs)
        finally:
            within = False
        exchange.measured(_module(trainer), _of_the_model(metrics))
        return metrics

    @functools.wraps(train)
    def train_global(*args: Any, **kwargs: Any) -> TrainOutput:
        exchange.begin(_module(trainer))
        if exchange.answered():
            return TrainOutput(trainer.state.global_step, 0.0, {})
        _have_ranks_train_together(trainer)
        if not restore_state and not given:
            # it makes a new one
            trainer.optimizer = None
        return train(*args, **kwargs)

    trainer.evaluate = evaluate_global  # type: ignore[method-assign]
    trainer.train = train_global  # type: ignore[method-assign]
    return trainer


class ClientLogger(TrainerCallback):
    """Sends what a trainer logs to the server: ``Trainer(callbacks=[flare.ClientLogger()])``."""

    def __init__(self) -> None:
        self._before = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for key, value in _of_the_model(kwargs.get("logs") or {}).items():
            log(key, value, "METRIC", global_step=self._before + state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # every training counts its steps from 0
        self._before += state.global_step


class _Patched(FLCallback):
    """The callback of `patch`."""


def _module(trainer: Trainer) -> Module:
    assert trainer.model is not None, "a trainer makes one if it was given none"
    return trainer.model


def _have_ranks_train_together(trainer: Trainer) -> None:
    """Have a model that was evaluated before its first training be wrapped for several ranks all the same.

    Accelerate notes on a model that it is ready when it is made ready for an evaluation; a training then takes it as it
    is, and every rank would train one of its own (accelerate 1.15, ``Accelerator.prepare_model``).
    """
    model, apart = _module(trainer), trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if trainer.args.world_size > 1 and not apart and trainer.model_wrapped is model:
        model._is_accelerate_prepared = False  # type: ignore[assignment]


def _of_the_model(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(_OF_THE_MACHINE)}
