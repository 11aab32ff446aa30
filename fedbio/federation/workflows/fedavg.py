"""Federated averaging: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1."""

from __future__ import annotations

__all__ = ["FedAvg", "Outcome"]

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fedbio.errors import FederationError, SettingsError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import IN_MEMORY, FLModel, Parameters, ParamsType, Result
from fedbio.federation.quantization import Travel
from fedbio.federation.state import Progress
from fedbio.federation.workflows.aggregation import Aggregation, Initial, make_aggregation
from fedbio.federation.workflows.selection import is_better, mean_metric, unreported
from fedbio.federation.workflows.site_metrics import named_metrics
from fedbio.settings import ModelSelection, Quantization
from fedbio.tensors.check import Manifest

log = logging.getLogger(__name__)

EXACT = Quantization()

ACCURACY = ModelSelection(metric="validation_accuracy")

VALIDATION = "validation_"
"""How the names of metrics begin that are averaged over validation proteins; others are over training proteins."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best model of a run, its round, and the metric that made it the best."""

    models: Aggregation
    model: FLModel
    """What carries it."""
    best_round: int
    best_value: float | None


class FedAvg(Controller):
    """Sites train the same model on their own data; the mean of their parameters is the next model.

    In a round, a site first measures the model that it received on its own validation proteins, then trains it for
    some epochs with a fresh optimizer. Round r is the model after r rounds of averaging. The best one is chosen by a
    metric over all sites' proteins together.

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
    selection : ModelSelection
        By which metric the best model is chosen.
    on_round : callable, optional
        Given the number of each round and the means of all metrics that sites reported of its model.

    Attributes
    ----------
    train, validate : str
        The tasks of a round, and of the last model, which is not trained any more.
    params_type : ParamsType or None
        Whether sites answer with whole models or with differences; None takes either.
    """

    train, validate = "train", "validate"
    params_type: ParamsType | None = ParamsType.FULL

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
        selection: ModelSelection = ACCURACY,
        on_round: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        super().__init__(runtime)
        self.name, self.initial, self.manifest = name, initial, manifest
        self.rounds, self.patience = rounds, patience
        self.training, self.validation, self.meta = training, validation, meta
        self.shared, self.selection, self.on_round = shared or {}, selection, on_round
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
        """Have the sites measure the model and, but for the last one, train it."""
        last = model.current_round == self.rounds
        return self.broadcast_and_wait(
            self.validate if last else self.train,
            msgspec.structs.replace(model, params={**self.shared, **model.params}),
            self.models.reach(model, self.choose(model)),
            expect=None if last else self.expect(model),
            weights=None if last else self.training,
            delivery=IN_MEMORY if last else self.models.delivery(model),
            travel=self.travel,
            params_type=self.params_type,
        )

    def choose(self, model: FLModel) -> list[str]:
        """Return the sites that take part in a round."""
        return [site for site in self.sites() if site in self.training]

    def expect(self, model: FLModel) -> Manifest | None:
        """Return what the tensors of an answer must be."""
        return self.models.manifest(self.runtime.outgoing(model, task=self.train))

    def select(self, model: FLModel, results: Sequence[Result]) -> None:
        """Compare the model that the sites have measured with the best one so far, and see whether to stop."""
        means = self.means(results)
        best_round, best_value = self.progress.best_round, self.progress.best_value
        value = means.get(self.selection.metric)
        if value is None and model.current_round == 0:
            self.warn(unreported(self.selection.metric, means))
        if is_better(self.selection, value, best_value):
            best_round, best_value = model.current_round, value
        finished = model.current_round == self.rounds or model.current_round - best_round >= self.patience
        self.progress = Progress(model.current_round, best_round, best_value, finished)
        if self.on_round is not None:
            self.on_round(model.current_round, means)
        if finished:
            self.state.save(self.job, self.name, self.progress)

    def warn(self, reason: str) -> None:
        """Say what is wrong with the metrics, in the log and in that of the job."""
        log.warning("job %s: %s: %s", self.job, self.name, reason)
        self.runtime.events.write("metric missing", run=self.name, metric=self.selection.metric, reason=reason)

    def means(self, results: Sequence[Result]) -> dict[str, float]:
        """Average each metric over all proteins of the sites that measured it; the sites' registered counts hold."""
        found = {}
        first = self.selection.metric
        names = {name for each in results for name in named_metrics(each.model.metrics, first=first)}
        for metric in sorted(names):
            counts = self.validation if metric.startswith(VALIDATION) else self.training
            if (mean := mean_metric(metric, results, counts)) is not None:
                found[metric] = mean
        return found

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
