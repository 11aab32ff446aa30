"""Turn what training and measuring came to into the rows of ``metrics.csv`` and ``predictions.csv``."""

from __future__ import annotations

__all__ = ["curve_metrics", "prediction_rows", "measured_metrics"]

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedbio.classifier.alone import CurvePoint
from fedbio.classifier.examples import TrainData
from fedbio.classifier.inference import Evaluation
from fedbio.results import Metric, Prediction


def curve_metrics(party: str, mlp: str, seed: int, curve: Iterable[CurvePoint]) -> list[Metric]:
    """Return a learning curve's rows; what was not measured has none."""
    return [
        Metric(party, mlp, split, seed, point.round, metric, value)
        for point in curve
        for split, metric, value in (
            ("train", "loss", point.train_loss),
            ("validation", "accuracy", point.validation_accuracy),
            ("validation", "loss", point.validation_loss),
        )
        if value is not None
    ]


def measured_metrics(party: str, mlp: str, seed: int, best_round: int, evaluation: Evaluation) -> list[Metric]:
    """Return the rows of the chosen round's model on test proteins; none if there are no test proteins."""
    measures = ("accuracy", "macro_f1", "mcc", "loss") if evaluation.count else ()
    return [Metric(party, mlp, "test", seed, best_round, name, getattr(evaluation, name)) for name in measures]


def prediction_rows(
    party: str, mlp: str, seed: int, data: TrainData, probabilities: NDArray[np.float32], classes: Sequence[str]
) -> list[Prediction]:
    """Return one row per protein of `data`, with the predicted class and its probability, to 6 digits."""
    predicted, confidence = probabilities.argmax(axis=1).tolist(), probabilities.max(axis=1).tolist()
    return [
        Prediction(name, classes[target], party, mlp, seed, classes[guess], round(probability, 6))
        for name, target, guess, probability in zip(data.ids, data.targets.tolist(), predicted, confidence, strict=True)
    ]
