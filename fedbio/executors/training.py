"""Tasks of training and measuring classifiers on the site's own embeddings."""

from __future__ import annotations

__all__ = ["Evaluate", "Initialize", "Train", "TrainAlone", "Validate"]

import math
from typing import ClassVar

from fedbio.classifier import TrainData, confidence_counts, initialize
from fedbio.executors.own_metrics import write_metrics
from fedbio.executors.predictions import write_predictions
from fedbio.executors.shelf import Shelf, StandardizedData, layers
from fedbio.executors.statistics import abstains
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import WEIGHT, FLModel, Parameters, Task
from fedbio.federation.workflows.study import MEAN, Alone, Evaluation, RunSpec, meta, read_meta, study_folder
from fedbio.results import FEDERATED
from fedbio.settings import parse_network


class Initialize(Executor):
    """Draws the parameters of round 0 from the run's seed: the same bits at any site."""

    name: ClassVar[str] = "initialize"
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return initial parameters."""
        spec = read_meta(model.meta, RunSpec)
        width, (hidden, attention) = len(model.params[MEAN]), parse_network(spec.hidden)
        params = initialize(width, hidden, len(spec.study.classes), seed=spec.seed, attention=attention)
        return FLModel(params=params)


class Train(Executor):
    """Measures the global model on validation proteins, then trains it on training proteins; shows both at once."""

    name: ClassVar[str] = "train"
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return new parameters, their weight, and metrics of the model that came."""
        from fedbio.classifier import train

        spec = read_meta(model.meta, RunSpec)
        data = self.shelf.standardized(spec.study, model.params, context)
        parameters = layers(model.params)
        metrics = validate(parameters, data)
        begin = model.current_round * spec.epochs
        for name, value in metrics.items():
            context.track(f"{spec.name}/{name}", value, begin)
        if abstains(len(data.train), spec.study, task.name, context):
            return FLModel(metrics=metrics, meta={WEIGHT: 0}, current_round=model.current_round)
        outcome = train(
            parameters,
            data.train,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            dropout=spec.dropout,
            seed=spec.seed,
            round_number=model.current_round,
            # the axis of the curves are epochs over all rounds
            on_epoch=lambda epoch, loss: context.track(f"{spec.name}/train_loss", loss, begin + epoch + 1),
        )
        return FLModel(
            params=outcome.parameters,
            metrics={**metrics, "train_loss": outcome.loss},
            meta={WEIGHT: len(data.train)},
            current_round=model.current_round,
            total_rounds=model.total_rounds,
        )


class Validate(Executor):
    """Measures the global model on validation proteins."""

    name: ClassVar[str] = "validate"
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "metrics"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return metrics of the model that came."""
        spec = read_meta(model.meta, RunSpec)
        data = self.shelf.standardized(spec.study, model.params, context)
        return FLModel(metrics=validate(layers(model.params), data), current_round=model.current_round)


class TrainAlone(Executor):
    """Trains a model of the site's own, with the budget of the federated run, and tries it on test proteins."""

    name: ClassVar[str] = "train_alone"
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "metrics"
    stage: ClassVar[str] = "train alone"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the curve, the best round and the counts on test proteins; the model stays here."""
        from fedbio.classifier import train_alone

        spec = read_meta(model.meta, RunSpec)
        data = self.shelf.standardized(spec.study, model.params, context)
        if not len(data.train):
            context.remark(f"{context.site} has no training proteins and no model of its own.")
            nothing = [[0] * len(data.classes) for _ in data.classes]
            return FLModel(meta=meta(Alone(0, [], Evaluation(nothing, 0.0))))
        hidden, attention = parse_network(spec.hidden)
        outcome = train_alone(
            data.train,
            data.validation,
            hidden=hidden,
            classes=len(data.classes),
            attention=attention,
            rounds=spec.rounds,
            epochs_per_round=spec.epochs,
            patience=spec.patience,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            dropout=spec.dropout,
            seed=spec.seed,
        )
        test = try_on_test(outcome.parameters, data, spec, context.site, context)
        alone = Alone(outcome.best_round, [*outcome.curve], test)
        write_metrics(study_folder(context.workspace, spec.study.place), spec, context.site, alone)
        return FLModel(meta=meta(alone))


class Evaluate(Executor):
    """Tries the best global model of a run on test proteins."""

    name: ClassVar[str] = "evaluate"
    kind: ClassVar[str] = "evaluate"
    leaves: ClassVar[str] = "metrics"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return counts on test proteins; the predictions stay here."""
        spec = read_meta(model.meta, RunSpec)
        data = self.shelf.standardized(spec.study, model.params, context)
        return FLModel(meta=meta(try_on_test(layers(model.params), data, spec, FEDERATED, context)))


def validate(parameters: Parameters, data: StandardizedData) -> dict[str, float]:
    """Return accuracy and loss on validation proteins; nothing without any."""
    from fedbio.classifier import evaluate

    if not len(data.validation):
        return {}
    measured = evaluate(parameters, data.validation)
    return {"validation_accuracy": measured.accuracy, "validation_loss": measured.loss}


def try_on_test(
    parameters: Parameters, data: StandardizedData, spec: RunSpec, party: str, context: SiteContext
) -> Evaluation:
    """Predict the test proteins, keep the predictions here, and return counts."""
    from fedbio.classifier import predict
    from fedbio.classifier.inference import measure

    probabilities = predict(parameters, data.test.features)
    measured = measure(probabilities, data.test.targets)
    folder = study_folder(context.workspace, spec.study.place)
    write_predictions(folder, data.test, probabilities, data.classes, party=party, mlp=spec.hidden, seed=spec.seed)
    return Evaluation(
        measured.confusion.tolist(),
        measured.loss if math.isfinite(measured.loss) else 0.0,
        confidence(parameters, data.validation),
    )


def confidence(parameters: Parameters, validation: TrainData) -> list[list[int]]:
    """Return counts of validation proteins by top probability, all and correct ones."""
    from fedbio.classifier import predict

    counts: list[list[int]] = confidence_counts(predict(parameters, validation.features), validation.targets).tolist()
    return counts
