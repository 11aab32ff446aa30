"""scikit-learn's MLPClassifier with partial_fit, made federated by five lines: those with a number behind them.

Each site makes embeddings of two locations of its own; replace `load_data` by your data.
"""

from __future__ import annotations

import numpy as np
from sklearn.neural_network import MLPClassifier

import fedbio.client as flare  # 1

CLASSES = np.array(["Cytoplasm", "Nucleus"])
WIDTH = 16


def load_data(site: str) -> tuple[np.ndarray, np.ndarray]:
    """Return 120 vectors of two locations, moved along by a site's own vector."""
    random = np.random.default_rng(sum(site.encode()))
    labels = np.arange(120) % 2
    centres = np.random.default_rng(0).normal(size=(2, WIDTH))
    features = centres[labels] + random.normal(size=(120, WIDTH)) + 0.2 * random.normal(size=WIDTH)
    return features, CLASSES[labels]


def make_classifier() -> MLPClassifier:
    """Return a classifier that knows its shape; scikit-learn draws the weights with the first batch."""
    classifier = MLPClassifier(hidden_layer_sizes=(32, 8), batch_size=16, learning_rate_init=0.01, random_state=0)
    return classifier.partial_fit(np.zeros((16, WIDTH)), np.repeat(CLASSES[:1], 16), classes=CLASSES)


def get_params(classifier: MLPClassifier) -> dict[str, np.ndarray]:
    weights = {f"coefs_.{layer}": each for layer, each in enumerate(classifier.coefs_)}
    return weights | {f"intercepts_.{layer}": each for layer, each in enumerate(classifier.intercepts_)}


def set_params(classifier: MLPClassifier, params: dict[str, np.ndarray]) -> None:
    for name, mine in get_params(classifier).items():
        mine[...] = params[name]


def initial_model() -> dict[str, np.ndarray]:
    """Return the model that all sites begin with; one site is asked for it."""
    return get_params(make_classifier())


def main() -> None:
    flare.init()  # 2
    features, labels = load_data(flare.get_site_name())
    training, validation = slice(0, 80), slice(80, 120)
    classifier = make_classifier()
    while flare.is_running():  # 3
        received = flare.receive()  # 4
        set_params(classifier, received.params)
        accuracy = classifier.score(features[validation], labels[validation])
        print(f"round {received.current_round} of {received.total_rounds}: accuracy {accuracy:.3f}")
        for _ in range(3):
            classifier.partial_fit(features[training], labels[training])
        flare.send(flare.FLModel(params=get_params(classifier), metrics={"accuracy": accuracy}))  # 5


if __name__ == "__main__":
    main()
