"""The classifier as a scikit-learn estimator, for pipelines, cross-validation and grid search."""

from __future__ import annotations

__all__ = ["FedbioClassifier"]

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fedbio.classifier.alone import train_alone
from fedbio.classifier.examples import TrainData
from fedbio.classifier.inference import predict
from fedbio.classifier.standardize import Standardizer
from fedbio.settings import parse_hidden


class FedbioClassifier(ClassifierMixin, BaseEstimator):
    """An MLP over embeddings: `fedbio.classifier.train_alone` behind scikit-learn's names.

    Parameters
    ----------
    hidden : str
        Widths of the hidden layers, for example ``"256-128-64"``.
    rounds, epochs : int
        The budget: so many rounds of so many passes.
    batch_size, learning_rate, weight_decay, dropout
        See `fedbio.classifier.train`.
    patience : int
        Stop after so many rounds without a better validation accuracy.
    validation_fraction : float
        Share of the training examples held back to choose the best round; 0 takes the last round.
    random_state : int, RandomState instance or None

    Attributes
    ----------
    classes_ : ndarray, shape (C,)
    n_features_in_ : int
    parameters_ : dict of str to ndarray, float32
    standardizer_ : Standardizer
    curve_ : list of CurvePoint
    best_round_, n_iter_ : int
        The round that was kept, and how many were trained.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(60, 8)), np.repeat(["Nucleus", "Plastid"], 30)
    >>> X[30:] += 3
    >>> FedbioClassifier(hidden="16", random_state=0).fit(X, y).predict(X[[0, -1]]).tolist()
    ['Nucleus', 'Plastid']
    """

    def __init__(
        self,
        hidden: str = "128-64",
        *,
        rounds: int = 100,
        epochs: int = 1,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        dropout: float = 0.2,
        patience: int = 20,
        validation_fraction: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.rounds = rounds
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> FedbioClassifier:
        """Train on embeddings, shape (n, D), and their labels, shape (n,)."""
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, targets = np.unique(y, return_inverse=True)
        random = check_random_state(self.random_state)
        held_back = self._choose_validation(targets, random)
        self.standardizer_ = Standardizer.fit(X[~held_back])
        features = self.standardizer_.apply(X)
        outcome = train_alone(
            TrainData(features[~held_back], targets[~held_back]),
            TrainData(features[held_back], targets[held_back]),
            hidden=parse_hidden(self.hidden),
            classes=len(self.classes_),
            rounds=self.rounds,
            epochs_per_round=self.epochs,
            patience=self.patience,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            dropout=self.dropout,
            seed=int(random.randint(2**31)),
        )
        self.parameters_, self.curve_ = outcome.parameters, outcome.curve
        self.best_round_, self.n_iter_ = outcome.best_round, max(len(outcome.curve) - 1, 1)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Return the probability of each class, shape (n, C), in the order of `classes_`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        return predict(self.parameters_, self.standardizer_.apply(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class, shape (n,)."""
        check_is_fitted(self)
        labels: NDArray[Any] = self.classes_[self.predict_proba(X).argmax(axis=1)]
        return labels

    def _choose_validation(self, targets: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.bool_]:
        # shuffled, then sorted by class: every so-manieth example takes from each class its share
        held_back = np.zeros(len(targets), dtype=np.bool_)
        shuffled = random.permutation(len(targets))
        ordered = shuffled[np.argsort(targets[shuffled], kind="stable")]
        wanted = min(round(len(targets) * self.validation_fraction), len(targets) - 1)
        held_back[ordered[(2 * np.arange(wanted) + 1) * len(targets) // max(2 * wanted, 1)]] = True
        return held_back
