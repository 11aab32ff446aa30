"""Federated averaging: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1."""

from __future__ import annotations

__all__ = ["FedAvg", "Outcome", "RoundMetrics"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from fedbio.errors import FederationError, SettingsError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import IN_MEMORY, FLModel, Parameters, Result
from fedbio.federation.quantization import Travel
from fedbio.federation.state import Progress
from fedbio.federation.workflows.aggregation import Aggregation, Initial, make_aggregation
from fedbio.settings import Quantization
from fedbio.tensors.check import Manifest

TRAIN, VALIDATE = "train", "validate"

EXACT = Quantization()

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

    models: Aggregation
    model: FLModel
    """What carries it."""
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
        Has a site make the model of round 0; called only if nothing was saved.
    manifest : mapping of str to (shape, dtype)
        What the parameters of the model of round 0 are.
    rounds, patience : int
        The most rounds, and how many may pass without a better model.
    training, validation : mapping of str to int
        The registered number of proteins of each site; sites that are not in it are not asked.
    meta : dict
        What every task tells the sites.
    shared : dict of str to ndarray, optional
        Tensors that the sites need beside the model, and that are not trained; they travel exact.
    quantization : Quantization
        How the models of rounds travel.
    aggregation : str
        Where the models are: ``"memory"`` or ``"file"`` of the server, or, in ``"lockstep"``, at the sites alone.
    on_round : callable, optional
        Given the metrics of each round.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        name: str,
        initial: Initial,
        manifest: Manifest,
        rounds: int,
        patience: int,
        training: Mapping[str, int],
        validation: Mapping[str, int],
        meta: dict[str, Any],
        shared: Parameters | None = None,
        quantization: Quantization = EXACT,
        aggregation: str = "memory",
        on_round: Callable[[RoundMetrics], None] | None = None,
    ) -> None:
        super().__init__(runtime)
        self.name, self.initial, self.manifest = name, initial, manifest
        self.rounds, self.patience = rounds, patience
        self.training, self.validation, self.meta = training, validation, meta
        self.shared, self.on_round = shared or {}, on_round
        self.models = make_aggregation(aggregation, runtime, name)
        self.travel = Travel(
            quantization.to_sites,
            quantization.to_server,
            exact=frozenset(self.shared),
            feedback=f"{self.job}/{name}" if quantization.error_feedback else "",
        )
        if aggregation != "memory" and (quantization.to_sites or runtime.outgoing.filters or runtime.incoming.filters):
            raise SettingsError(
                f"job {self.job}: aggregation {aggregation!r} holds no model that the server could quantize or filter; "
                "leave quantization.to_sites and the server's filters out, or aggregate in memory"
            )
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
            # what results hold, in memory or on disk, is given back before the next ones come
            del results
        return self.best()

    def load(self) -> FLModel:
        """Return the model that was saved last, or a new one."""
        saved = self.state.progress(self.job, self.name)
        if saved is not None:
            self.progress = saved
            number = saved.best_round if saved.finished else saved.round
            return self.model(self.models.load(number), number)
        model = self.model(self.models.begin(self.initial, self.manifest), 0)
        self.save(model)
        return model

    def model(self, model: FLModel, number: int) -> FLModel:
        """Put what carries a model into what the sites get."""
        return msgspec.structs.replace(model, meta=self.meta, current_round=number, total_rounds=self.rounds)

    def broadcast_and_wait_for_round(self, model: FLModel) -> list[Result]:
        """Have every site measure the model and, but for the last one, train it."""
        last = model.current_round == self.rounds
        return self.broadcast_and_wait(
            VALIDATE if last else TRAIN,
            msgspec.structs.replace(model, params={**self.shared, **model.params}),
            self.models.reach(model, [site for site in self.sites() if site in self.training]),
            expect=None if last else self.models.manifest(self.runtime.outgoing(model, task=TRAIN)),
            weights=None if last else self.training,
            delivery=IN_MEMORY if last else self.models.delivery(model),
            travel=self.travel,
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
        updates = [each for each in results if each.model.weight > 0]
        if not updates:
            raise FederationError(
                f"job {self.job}: every site abstained from {self.name}; more training proteins are needed at the sites"
            )
        return self.model(self.models.mean(model, updates, self.progress.best_round), model.current_round + 1)

    def save(self, model: FLModel) -> None:
        """Save the model, so that a server that was killed goes on from here."""
        self.progress = msgspec.structs.replace(self.progress, round=model.current_round)
        self.models.save(self.progress, model)

    def best(self) -> Outcome:
        """Return the best model."""
        number = self.progress.best_round
        return Outcome(self.models, self.models.load(number), number, self.progress.best_value)


def _mean(results: Sequence[Result], metric: str, counts: Mapping[str, int]) -> float | None:
    """Average a metric over all proteins of the sites that measured it; counts are those that the sites registered."""
    measured = [
        (each.model.metrics[metric], counts.get(each.site, 0)) for each in results if metric in each.model.metrics
    ]
    total = sum(count for _, count in measured)
    return sum(value * count for value, count in measured) / total if total else None
