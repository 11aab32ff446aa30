"""Train a network on embeddings for some epochs, from given parameters to new ones."""

from __future__ import annotations

__all__ = ["TrainOutcome", "train"]

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fedbio.classifier.architecture import Parameters
from fedbio.classifier.examples import TrainData
from fedbio.classifier.network import Network, check_input, reader
from fedbio.classifier.optimizer import AdamW
from fedbio.classifier.threads import torch_threads
from fedbio.errors import DataError


@dataclass(frozen=True)
class TrainOutcome:
    """What training came to.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
    loss : float
        Mean cross-entropy over the proteins as they were seen in the last epoch, with dropout.
    steps : int
        Number of steps.
    """

    parameters: Parameters
    loss: float
    steps: int


def train(
    parameters: Parameters,
    data: TrainData,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    dropout: float = 0.2,
    seed: int = 0,
    round_number: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> TrainOutcome:
    """Train with a fresh AdamW.

    Parameters
    ----------
    parameters : dict of str to ndarray, float32
        Where training starts; left as they are.
    data : TrainData
    epochs : int
        Passes over `data`, each in an order of its own.
    batch_size : int
        The most proteins in a step; the batches of an epoch are of even size.
    learning_rate, weight_decay, dropout : float
    seed, round_number : int
        Together they decide orders and dropout: another round sees another order.
    on_epoch : callable, optional
        Called after each epoch with its number, from 0, and the mean cross-entropy over the proteins as they were seen.

    Returns
    -------
    TrainOutcome
        The same bits for the same arguments, and as many threads of torch, on the same machine.

    Raises
    ------
    DataError
        If there is no protein, the model takes other embeddings, or the loss is no longer finite.
    """
    count = len(data)
    if not count:
        raise DataError("no protein to train on; a site needs labelled proteins with SET=train")
    random = np.random.default_rng([seed, round_number])
    generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    network = Network(parameters, dropout=dropout, generator=generator).train()
    check_input(network, data.features)
    read = reader(network, data.features)
    optimizer = AdamW(network, learning_rate=learning_rate, weight_decay=weight_decay)
    targets = torch.from_numpy(np.array(data.targets, dtype=np.int64))
    batches = math.ceil(count / batch_size)
    total = torch.zeros(())
    with torch_threads(network.threads):
        for epoch in range(epochs):
            order = torch.from_numpy(random.permutation(count))
            total.zero_()
            for batch in order.tensor_split(batches):
                loss = F.cross_entropy(network(*read(batch)), targets.index_select(0, batch))
                optimizer.step(loss)
                total += loss.detach() * len(batch)
            if on_epoch is not None:
                on_epoch(epoch, float(total) / count)
    mean_loss = float(total) / count
    if not math.isfinite(mean_loss):
        raise DataError(
            f"the loss became {mean_loss} within {epochs * batches} steps; lower training.learning_rate "
            f"(now {learning_rate:g}), and see that the embeddings are finite"
        )
    return TrainOutcome(network.to_parameters(), mean_loss, epochs * batches)
