from __future__ import annotations

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.estimator_checks import parametrize_with_checks

from fedbio.classifier import FedbioClassifier


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.repeat(["Cytoplasm", "Nucleus", "Plastid"], 40)
    centres = {"Cytoplasm": -1.0, "Nucleus": 0.0, "Plastid": 1.0}
    return random.normal(0, 0.5, (120, 20)) + np.array([[centres[name]] for name in labels]), labels


@parametrize_with_checks([FedbioClassifier(hidden="16", rounds=20, random_state=0)])
@pytest.mark.filterwarnings("ignore")
def test_it_keeps_the_contract_of_scikit_learn(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


def test_labels_come_back_as_they_were_given(problem: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = problem
    estimator = FedbioClassifier(hidden="16", learning_rate=0.01, random_state=0).fit(X, y)
    assert estimator.classes_.tolist() == ["Cytoplasm", "Nucleus", "Plastid"]
    assert estimator.score(X, y) > 0.95
    np.testing.assert_allclose(estimator.predict_proba(X).sum(axis=1), 1, rtol=1e-5)


def test_it_works_in_a_pipeline_and_a_search(problem: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = problem
    estimator = FedbioClassifier(hidden="8", rounds=10, learning_rate=0.01, random_state=0)
    assert cross_val_score(make_pipeline(Normalizer(), estimator), X, y, cv=2).mean() > 0.6
    search = GridSearchCV(estimator, {"hidden": ["8", "16-8"]}, cv=2).fit(X, y)
    assert search.best_params_["hidden"] in {"8", "16-8"}


def test_without_validation_it_trains_all_rounds(problem: tuple[np.ndarray, np.ndarray]) -> None:
    estimator = FedbioClassifier(hidden="8", rounds=3, validation_fraction=0, random_state=0).fit(*problem)
    assert estimator.best_round_ == estimator.n_iter_ == 3


def test_it_says_when_it_is_not_fitted() -> None:
    with pytest.raises(NotFittedError):
        FedbioClassifier().predict(np.zeros((2, 4)))
