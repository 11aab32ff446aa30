"""Apply a network: probabilities for embeddings, and how often they are right."""

from __future__ import annotations

__all__ = ["Evaluation", "evaluate", "measure", "predict"]

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedbio.classifier.architecture import Parameters
from fedbio.classifier.examples import TrainData
from fedbio.classifier.metrics import accuracy, confusion_matrix, macro_f1, mcc
from fedbio.classifier.network import Network, as_tensor, check_input, reader
from fedbio.classifier.residues import Features, Residues
from fedbio.classifier.threads import torch_threads

BLOCK_ROWS = 16_384
"""Proteins at a time, so that memory does not grow with their number."""
BLOCK_RESIDUES = 16_384
"""Residues at a time, and those of the protein that reaches it."""


@dataclass(frozen=True)
class Evaluation:
    """How a model did on some proteins, in numbers that several sites may add up.

    Parameters
    ----------
    correct, count : int
        Proteins whose class was predicted, and all.
    loss : float
        Mean cross-entropy; nan without any protein.
    confusion : ndarray, shape (C, C), int64
        Rows are true classes, columns predicted ones.
    """

    correct: int
    count: int
    loss: float
    confusion: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Share of `correct`; nan without any protein."""
        return accuracy(self.confusion)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur or are predicted."""
        return macro_f1(self.confusion)

    @property
    def mcc(self) -> float:
        """Matthews's correlation coefficient."""
        return mcc(self.confusion)


def predict(parameters: Parameters, features: Features) -> NDArray[np.float32]:
    """Return the probability of each class.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
    features : ndarray, shape (n, D), float32, or Residues

    Returns
    -------
    ndarray, shape (n, C), float32
        Rows sum to 1.

    Raises
    ------
    DataError
        If the model takes other embeddings.
    """
    network = Network(parameters).eval()
    check_input(network, features)
    if not len(features):
        return np.empty((0, network.classes), dtype=np.float32)
    blocks: Iterable[tuple[Any, ...]]
    if isinstance(features, Residues):
        blocks = map(reader(network, features), _blocks(features.lengths))
    else:
        blocks = zip(torch.split(as_tensor(features), BLOCK_ROWS), strict=True)
    with torch_threads(network.threads), torch.inference_mode():
        return torch.cat([network(*block).softmax(dim=1) for block in blocks]).numpy()


def _blocks(lengths: NDArray[np.int64]) -> Iterator[torch.Tensor]:
    numbers = (np.cumsum(lengths) - 1) // BLOCK_RESIDUES
    for block in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(numbers)) + 1):
        yield torch.from_numpy(block)


def evaluate(parameters: Parameters, data: TrainData) -> Evaluation:
    """Predict the classes of `data` and compare them with the true ones; data without a protein have count 0."""
    return measure(predict(parameters, data.features), data.targets)


def measure(probabilities: NDArray[np.float32], targets: NDArray[np.int64]) -> Evaluation:
    """Compare probabilities, shape (n, C), with the true classes, shape (n,)."""
    count, classes = probabilities.shape
    confusion = confusion_matrix(targets, probabilities.argmax(axis=1), classes)
    # a probability of 0 is one that float32 could not hold
    of_target = np.maximum(probabilities[np.arange(count), targets], np.finfo(np.float32).tiny)
    loss = float(-np.log(of_target.astype(np.float64)).mean()) if count else math.nan
    return Evaluation(int(np.trace(confusion)), count, loss, confusion)
