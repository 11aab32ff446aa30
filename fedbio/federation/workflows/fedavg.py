"""Federated averaging: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1."""

from __future__ import annotations

__all__ = ["FedAvg", "Outcome", "RoundMetrics"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from fedbio.errors import FederationError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Parameters, ParamsType, Result
from fedbio.federation.state import Progress
from fedbio.tensors import manifest, weighted_mean

TRAIN, VALIDATE = "train", "validate"

TIE = 1e-9
"""Accuracies nearer than this are equal: they are ratios of counts, averaged in floating point."""


class RoundMetrics(NamedTuple):
    """Means over all sites' proteins of one round's model; None where no site measured anything."""

    round: int
    validation_accuracy: float | None
    validation_loss: float | None
    train_loss: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best model of a run, its round, and the validation accuracy that made it the best."""

    params: Parameters
    best_round: int
    best_value: float | None


class FedAvg(Controller):
    """Sites train the same model on their own data; the mean of their parameters is the next model.

    In a round, a site first measures the model that it received on its own validation proteins, then trains it for
    some epochs with a fresh optimizer. The model is chosen by the accuracy on all sites' validation proteins together,
    the first of equals; round r is the model after r rounds of averaging.

    Parameters
    ----------
    runtime : Runtime
    name : str
        The run's name within its job; what was saved under it is gone on from.
    initial : callable
        Returns the parameters of round 0; called only if nothing was saved.
    rounds, patience : int
        The most rounds, and how many may pass without a better model.
    training, validation : mapping of str to int
        The registered number of proteins of each site; sites that are not in it are not asked.
    meta : dict
        What every task tells the sites.
    shared : dict of str to ndarray, optional
        Tensors that the sites need beside the model, and that are not trained.
    on_round : callable, optional
        Given the metrics of each round.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        name: str,
        initial: Callable[[], Parameters],
        rounds: int,
        patience: int,
        training: Mapping[str, int],
        validation: Mapping[str, int],
        meta: dict[str, Any],
        shared: Parameters | None = None,
        on_round: Callable[[RoundMetrics], None] | None = None,
    ) -> None:
        super().__init__(runtime)
        self.name, self.initial, self.rounds, self.patience = name, initial, rounds, patience
        self.training, self.validation, self.meta = training, validation, meta
        self.shared, self.on_round = shared or {}, on_round
        self.progress = Progress()

    def run(self) -> Outcome:
        """Average until the rounds are over or nothing gets better; return the best model."""
        model = self.load()
        while not self.progress.finished:
            results = self.broadcast_and_wait_for_round(model)
            self.select(model, results)
            if not self.progress.finished:
                model = self.aggregate(model, results)
                self.save(model)
        return self.best()

    def load(self) -> FLModel:
        """Return the model that was saved last, or a new one."""
        saved = self.state.progress(self.job, self.name)
        if saved is not None:
            self.progress = saved
            number = saved.best_round if saved.finished else saved.round
            return self.model(self.state.model(self.job, self.name, number), number)
        model = self.model(self.initial(), 0)
        self.save(model)
        return model

    def model(self, params: Parameters, number: int) -> FLModel:
        """Put parameters into what the sites get."""
        return FLModel(params=params, meta=self.meta, current_round=number, total_rounds=self.rounds)

    def broadcast_and_wait_for_round(self, model: FLModel) -> list[Result]:
        """Have every site measure the model and, but for the last one, train it."""
        last = model.current_round == self.rounds
        return self.broadcast_and_wait(
            VALIDATE if last else TRAIN,
            msgspec.structs.replace(model, params={**self.shared, **model.params}),
            [site for site in self.sites() if site in self.training],
            expect=None if last else manifest(self.runtime.outgoing(model, task=TRAIN).params),
            weights=None if last else self.training,
        )

    def select(self, model: FLModel, results: Sequence[Result]) -> None:
        """Compare the model that the sites have measured with the best one so far, and see whether to stop."""
        metrics = RoundMetrics(
            model.current_round,
            _mean(results, "validation_accuracy", self.validation),
            _mean(results, "validation_loss", self.validation),
            _mean(results, "train_loss", self.training),
        )
        best_round, best_value = self.progress.best_round, self.progress.best_value
        value = metrics.validation_accuracy
        if value is None or best_value is None or value > best_value + TIE:
            best_round, best_value = model.current_round, value
        finished = model.current_round == self.rounds or model.current_round - best_round >= self.patience
        self.progress = Progress(model.current_round, best_round, best_value, finished)
        if self.on_round is not None:
            self.on_round(metrics)
        if finished:
            self.state.save(self.job, self.name, self.progress)

    def aggregate(self, model: FLModel, results: Sequence[Result]) -> FLModel:
        """Return the next model: the mean of the sites' parameters, weighted by their numbers of proteins."""
        updates = [(each.site, each.model.params, each.model.weight) for each in results if each.model.weight > 0]
        if not updates:
            raise FederationError(
                f"job {self.job}: every site abstained from {self.name}; more training proteins are needed at the sites"
            )
        mean = weighted_mean(updates)
        if results[0].model.params_type is ParamsType.DIFF:
            mean = {name: model.params[name] + change for name, change in mean.items()}
        # what a filter held back stays as it was
        return self.model({**model.params, **mean}, model.current_round + 1)

    def save(self, model: FLModel) -> None:
        """Save the model, so that a server that was killed goes on from here."""
        self.progress = msgspec.structs.replace(self.progress, round=model.current_round)
        self.state.save(self.job, self.name, self.progress, model.params)

    def best(self) -> Outcome:
        """Return the best model."""
        number = self.progress.best_round
        return Outcome(self.state.model(self.job, self.name, number), number, self.progress.best_value)


def _mean(results: Sequence[Result], metric: str, counts: Mapping[str, int]) -> float | None:
    """Average a metric over all proteins of the sites that measured it; counts are those that the sites registered."""
    measured = [
        (each.model.metrics[metric], counts.get(each.site, 0)) for each in results if metric in each.model.metrics
    ]
    total = sum(count for _, count in measured)
    return sum(value * count for value, count in measured) / total if total else None
