"""Classifiers over features of proteins, and how sure one may be of their figures: the parts of `scl_probe.py`."""

from __future__ import annotations

__all__ = [
    "Fitted",
    "Parts",
    "Scores",
    "boosted_trees",
    "central",
    "compositions",
    "interval",
    "logistic_regression",
    "score",
    "vote",
]

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from fedbio.classifier import Standardizer, TrainData, predict, train_alone
from fedbio.classifier.residues import Residues
from fedbio.classifier.threads import torch_threads
from fedbio.compartments import COMPARTMENTS
from fedbio.networks import parse_network
from fedbio.settings import TrainingSettings

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
TERMINI = (10, 20, 40, 60)
"""Residues of the windows at both ends."""

RESAMPLES = 2_000

COMPONENTS = 256
"""Trees look at so many principal components of embeddings that are wider: each of their steps costs time for each
feature."""

Features = NDArray[np.float32]
Classes = NDArray[np.int64]
Shares = NDArray[np.floating]
Scores = dict[str, NDArray[np.float64]]
"""Accuracy, macro F1 and MCC: the value, then that of each resample, shape (1 + `RESAMPLES`,)."""


@dataclass(frozen=True)
class Parts:
    """Which proteins are for what.

    Parameters
    ----------
    targets : ndarray, shape (proteins,), int64
        Number of each protein's class.
    train, validation, test : ndarray, int64
        Places of the proteins of each part.
    """

    targets: Classes
    train: Classes
    validation: Classes
    test: Classes


@dataclass(frozen=True)
class Fitted:
    """A kind of model that was trained, once or with several seeds.

    Parameters
    ----------
    model : str
    validation : float
        Accuracy on validation proteins, mean over the runs.
    predicted : ndarray, shape (runs, test proteins), int64
        Classes of the test proteins.
    shares : pair of ndarray, shape (proteins, classes), or None
        Probabilities of the classes of validation and test proteins, mean over the runs; where they are known.
    """

    model: str
    validation: float
    predicted: Classes
    shares: tuple[Shares, Shares] | None = None


def compositions(sequences: Sequence[str]) -> Features:
    """Return what the letters alone say, shape (proteins, 20 + 400 + 2 * 20 * windows + 1)."""
    number = np.full(256, len(LETTERS), np.int64)
    number[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(len(LETTERS))

    def shares(codes: Classes, kinds: int) -> NDArray[np.float64]:
        counts = np.bincount(codes[codes < kinds], minlength=kinds)[:kinds]
        found: NDArray[np.float64] = counts / max(1, counts.sum())
        return found

    rows = []
    for sequence in sequences:
        codes = number[np.frombuffer(sequence.encode(), np.uint8)]
        usual = (codes[:-1] < len(LETTERS)) & (codes[1:] < len(LETTERS))
        pairs = (codes[:-1] * len(LETTERS) + codes[1:])[usual]
        windows = [shares(part, len(LETTERS)) for size in TERMINI for part in (codes[:size], codes[-size:])]
        rows.append(np.concatenate([shares(codes, len(LETTERS)), shares(pairs, 400), *windows, [np.log(len(codes))]]))
    return np.array(rows, np.float32)


def score(targets: Classes, predicted: Classes) -> Scores:
    """Measure predictions, shape (runs, proteins), and the same on resampled proteins; each the mean over the runs.

    The same number of proteins is resampled in the same way, so that the scores of two models may be subtracted: the
    result is a paired bootstrap.
    """
    classes, runs = len(COMPARTMENTS), len(predicted)
    cells = targets * classes + predicted + classes**2 * np.arange(runs)[:, None]
    draws = np.random.default_rng(0).integers(0, len(targets), size=(RESAMPLES, len(targets)))
    found: Scores = {name: np.empty(1 + RESAMPLES) for name in ("accuracy", "macro_f1", "mcc")}
    for place, rows in enumerate((np.arange(len(targets)), *draws)):
        counts = np.bincount(cells[:, rows].ravel(), minlength=runs * classes**2)
        for name, values in _measures(counts.reshape(runs, classes, classes).astype(np.float64)).items():
            found[name][place] = values.mean()
    return found


def _measures(confusion: NDArray[np.float64]) -> Scores:
    """Measure as `fedbio.classifier` does, for confusion matrices of shape (runs, C, C) at once."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    seen, said, total = confusion.sum(axis=2), confusion.sum(axis=1), confusion.sum(axis=(1, 2))
    right, met = hits.sum(axis=1), seen + said > 0
    f1 = 2 * hits / np.where(met, seen + said, 1)
    spread = np.sqrt((total**2 - (said**2).sum(axis=1)) * (total**2 - (seen**2).sum(axis=1)))
    covariance = right * total - (seen * said).sum(axis=1)
    return {
        "accuracy": right / total,
        "macro_f1": f1.sum(axis=1) / met.sum(axis=1),
        "mcc": np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0),
    }


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the value, and the ends of its 95 % interval."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def boosted_trees(features: Features, embedded: Features | None, parts: Parts) -> Fitted:
    """Train gradient-boosted trees; the learning rate and the number of trees are chosen on validation."""
    if embedded is not None:
        features = np.hstack([features, _narrow(embedded, parts)])
    train, validation = parts.train, parts.validation

    def fit(rate: float) -> Fitted:
        trees = HistGradientBoostingClassifier(
            learning_rate=rate, max_iter=400, max_leaf_nodes=15, max_bins=63, l2_regularization=1.0,
            early_stopping=True, n_iter_no_change=15, random_state=0,
        )  # fmt: skip
        trees.fit(features[train], parts.targets[train], X_val=features[validation], y_val=parts.targets[validation])
        return _fitted("boosted trees", trees, features, parts)

    return max(_side_by_side(fit, (0.05, 0.1)), key=lambda each: each.validation)


def _narrow(embedded: Features, parts: Parts) -> Features:
    if embedded.shape[1] <= COMPONENTS:
        return embedded
    components = min(COMPONENTS, len(parts.train))
    pipe = make_pipeline(StandardScaler(), PCA(components, svd_solver="covariance_eigh"))
    found: Features = pipe.fit(embedded[parts.train]).transform(embedded).astype(np.float32)
    return found


def logistic_regression(features: Features, parts: Parts) -> Fitted:
    """Train a linear model; its penalty is chosen on validation."""
    features = StandardScaler().fit(features[parts.train]).transform(features)

    def fit(strength: float) -> Fitted:
        linear = LogisticRegression(C=strength, max_iter=200)
        linear.fit(features[parts.train], parts.targets[parts.train])
        return _fitted("logistic regression", linear, features, parts)

    with warnings.catch_warnings():
        # stopped before its optimum is one more way to be regular, and validation chooses
        warnings.simplefilter("ignore", ConvergenceWarning)
        return max(_side_by_side(fit, (0.0003, 0.003, 0.03, 0.3)), key=lambda each: each.validation)


def _fitted(name: str, model: Any, features: Features, parts: Parts) -> Fitted:
    def shares(rows: Classes) -> Shares:
        # a class without a training protein is none that the model knows
        found = np.zeros((len(rows), len(COMPARTMENTS)))
        found[:, model.classes_] = model.predict_proba(features[rows])
        return found

    validation, test = shares(parts.validation), shares(parts.test)
    return Fitted(name, _accuracy(validation, parts), test.argmax(axis=1)[None], (validation, test))


def vote(models: Sequence[Fitted], parts: Parts) -> Fitted:
    """Have kinds of models decide together, by the mean of their probabilities: each counts alike, nothing is tuned."""
    shares = [each.shares for each in models if each.shares is not None]
    validation, test = (np.mean([each[part] for each in shares], axis=0) for part in (0, 1))
    return Fitted("vote of all", _accuracy(validation, parts), test.argmax(axis=1)[None], (validation, test))


def _side_by_side(fit: Callable[[float], Fitted], values: Sequence[float]) -> list[Fitted]:
    """Fit with each value on a thread of its own: threads that share one fit wait for each other, eight times longer
    on a machine that does something else as well."""

    def run(value: float) -> Fitted:
        with threadpool_limits(1, user_api="openmp"):  # holds for one thread; that of BLAS for all
            return fit(value)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(run, values))


def _accuracy(validation: Shares, parts: Parts) -> float:
    return float((validation.argmax(axis=1) == parts.targets[parts.validation]).mean())


def central(features: Features | Residues, parts: Parts, training: TrainingSettings) -> Fitted:
    """Train the first network of the settings on all training proteins, once a seed, as `fedbio train` does."""
    network = parse_network(training.mlps[0])
    standardizer = Standardizer.fit(features[parts.train])
    train, validation = (
        TrainData(standardizer.apply(features[rows]), parts.targets[rows]) for rows in (parts.train, parts.validation)
    )
    test = standardizer.apply(features[parts.test])

    def run(seed: int) -> tuple[float, Shares, Shares]:
        outcome = train_alone(
            train,
            validation,
            hidden=network.hidden,
            attention=network.attention,
            classes=len(COMPARTMENTS),
            rounds=training.rounds,
            epochs_per_round=training.epochs,
            patience=training.patience,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            dropout=training.dropout,
            seed=seed,
        )
        accuracies = [point.validation_accuracy or 0.0 for point in outcome.curve]
        shares = [predict(outcome.parameters, each) for each in (validation.features, test)]
        return accuracies[outcome.best_round], *shares

    with torch_threads(1), ThreadPoolExecutor(min(len(training.seeds), len(os.sched_getaffinity(0)))) as pool:
        accuracies, *runs = zip(*pool.map(run, training.seeds), strict=True)
    shares = np.mean(runs[0], axis=0), np.mean(runs[1], axis=0)
    name = "central MLP" if network.attention is None else "central light attention"
    return Fitted(name, float(np.mean(accuracies)), np.argmax(runs[1], axis=2), shares)
