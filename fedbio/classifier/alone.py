"""Train on one's own proteins alone, with the budget that a federated run has."""

from __future__ import annotations

__all__ = ["AloneOutcome", "CurvePoint", "train_alone"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedbio.classifier.architecture import Parameters, initialize
from fedbio.classifier.examples import TrainData
from fedbio.classifier.inference import evaluate
from fedbio.classifier.training import train
from fedbio.networks import Attention


class CurvePoint(NamedTuple):
    """One round: the model after `round` rounds on validation, and the loss of the training that follows it.

    A value is None where nothing was measured: no validation proteins, or no further training.
    """

    round: int
    train_loss: float | None
    validation_accuracy: float | None
    validation_loss: float | None


@dataclass(frozen=True)
class AloneOutcome:
    """What training alone came to.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
        Those of the best round.
    best_round : int
        The first of those with the best validation accuracy; the last round if there are no validation proteins.
    curve : list of CurvePoint
        One point per round, from round 0, the untrained model.
    """

    parameters: Parameters
    best_round: int
    curve: list[CurvePoint]


def train_alone(
    data: TrainData,
    validation: TrainData,
    *,
    hidden: Sequence[int],
    classes: int,
    attention: Attention | None = None,
    rounds: int,
    epochs_per_round: int = 1,
    patience: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    dropout: float = 0.2,
    seed: int = 0,
    on_round: Callable[[CurvePoint], None] | None = None,
) -> AloneOutcome:
    """Train as one site of a federation would, but keep one's own model from round to round.

    Parameters
    ----------
    data, validation : TrainData
        Standardized embeddings, of residues for light attention.
    hidden : sequence of int
        Widths of the hidden layers.
    classes : int
        Number of classes, C.
    attention : Attention, optional
        Light attention before the hidden layers; then the data are residues.
    rounds, epochs_per_round : int
        The budget; each round begins with a fresh optimizer, as in federated averaging.
    patience : int
        Stop after so many rounds without a better validation accuracy.
    batch_size, learning_rate, weight_decay, dropout
        See `fedbio.classifier.train`.
    seed : int
        Decides the first parameters, orders and dropout.
    on_round : callable, optional
        Given each point of the curve.

    Returns
    -------
    AloneOutcome
    """
    parameters = best = initialize(data.features.shape[1], hidden, classes, seed=seed, attention=attention)
    best_round, best_accuracy = 0, None
    curve: list[CurvePoint] = []
    for number in range(rounds + 1):
        measured = evaluate(parameters, validation) if len(validation) else None
        if measured is None or best_accuracy is None or measured.accuracy > best_accuracy:
            best, best_round, best_accuracy = parameters, number, measured.accuracy if measured else None
        finished = number == rounds or number - best_round >= patience
        loss = None
        if not finished:
            outcome = train(
                parameters,
                data,
                epochs=epochs_per_round,
                batch_size=batch_size,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                dropout=dropout,
                seed=seed,
                round_number=number,
            )
            parameters, loss = outcome.parameters, outcome.loss
        point = CurvePoint(number, loss, measured.accuracy if measured else None, measured.loss if measured else None)
        curve.append(point)
        if on_round is not None:
            on_round(point)
        if finished:
            break
    return AloneOutcome(best, best_round, curve)
