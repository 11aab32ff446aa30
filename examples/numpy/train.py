"""Logistic regression in plain NumPy, made federated by five lines: those with a number behind them.

Each site makes points of two classes of its own; replace `load_data` by your data.
"""

from __future__ import annotations

import numpy as np

import fedbio.client as flare  # 1


def load_data(site: str) -> tuple[np.ndarray, np.ndarray]:
    """Return 120 points of two classes, moved along by a site's own vector."""
    random = np.random.default_rng(sum(site.encode()))
    labels = np.arange(120) % 2
    centres = np.array([[1.0, -1.0, 0.5, 0.0], [-1.0, 1.0, 0.0, 0.5]])
    return centres[labels] + 0.8 * random.normal(size=(120, 4)) + 0.2 * random.normal(size=4), labels


def initial_model() -> dict[str, np.ndarray]:
    """Return the model that all sites begin with; one site is asked for it."""
    return {"weight": np.zeros(4), "bias": np.zeros(())}


def predict(params: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(features @ params["weight"] + params["bias"])))


def main() -> None:
    flare.init()  # 2
    features, labels = load_data(flare.get_site_name())
    training, validation = slice(0, 80), slice(80, 120)
    while flare.is_running():  # 3
        received = flare.receive()  # 4
        params = received.params
        accuracy = np.mean((predict(params, features[validation]) > 0.5) == labels[validation])
        print(f"round {received.current_round} of {received.total_rounds}: accuracy {accuracy:.3f}")
        for _ in range(20):
            error = predict(params, features[training]) - labels[training]
            params["weight"] -= 0.1 * features[training].T @ error / len(error)
            params["bias"] -= 0.1 * error.mean()
        flare.send(flare.FLModel(params=params, metrics={"accuracy": accuracy}))  # 5


if __name__ == "__main__":
    main()
