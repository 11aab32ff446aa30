"""A site's predictions: one part per model, so that a run done again replaces its own rows; all parts make one file."""

from __future__ import annotations

__all__ = ["gather_predictions", "write_predictions"]

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedbio.classifier import TrainData
from fedbio.results import PREDICTIONS_COLUMNS, PREDICTIONS_FILE, write_table

PARTS = "predictions"


def write_predictions(
    workspace: Path,
    data: TrainData,
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
    *,
    party: str,
    mlp: str,
    seed: int,
) -> None:
    """Write what one model says of the site's test proteins.

    Parameters
    ----------
    data : TrainData
        The test proteins, with ids.
    probabilities : ndarray, shape (n, C), float32
    """
    # imports torch
    from fedbio.classifier.records import prediction_rows

    rows = prediction_rows(party, mlp, seed, data, probabilities, classes)
    write_table(workspace / PARTS / f"{party}-{mlp}-seed-{seed}.csv", PREDICTIONS_COLUMNS, rows)


def gather_predictions(workspace: Path) -> None:
    """Put all parts together, in the order of their names, as ``predictions.csv``."""
    parts = sorted((workspace / PARTS).glob("*.csv"))
    write_table(workspace / PREDICTIONS_FILE, PREDICTIONS_COLUMNS, _rows(parts))


def _rows(parts: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    for part in parts:
        with open(part, newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows)
            yield from map(tuple, rows)
