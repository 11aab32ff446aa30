"""The rows that what was measured in a study becomes in a table of metrics, at the server and at the sites."""

from __future__ import annotations

__all__ = ["CURVE", "alone_rows", "curve_rows", "test_rows"]

from collections.abc import Mapping, Sequence

import numpy as np

from fedbio.federation.workflows.study import Alone, Evaluation, RunSpec, confusion_of, scores
from fedbio.results import Metric

CURVE = (("train", "loss"), ("validation", "accuracy"), ("validation", "loss"))
"""What is measured of the model of a round."""


def curve_rows(spec: RunSpec, party: str, number: int, values: Mapping[tuple[str, str], float | None]) -> list[Metric]:
    """Return the rows of one round; what was not measured has none."""
    return [
        Metric(party, spec.hidden, split, spec.seed, number, metric, value)
        for (split, metric) in CURVE
        if (value := values.get((split, metric))) is not None
    ]


def test_rows(spec: RunSpec, party: str, number: int, evaluations: Sequence[Evaluation]) -> list[Metric]:
    """Return the rows of one model over the test proteins of those that tried it; none without test proteins.

    Raises
    ------
    ProtocolError
        If a confusion matrix does not fit the study's classes.
    """
    confusion = confusion_of(evaluations, len(spec.study.classes))
    if not confusion.sum():
        return []
    counts = [int(np.sum(each.confusion)) for each in evaluations]
    found = {**scores(confusion), "loss": float(np.average([each.loss for each in evaluations], weights=counts))}
    return [Metric(party, spec.hidden, "test", spec.seed, number, name, value) for name, value in found.items()]


def alone_rows(spec: RunSpec, site: str, alone: Alone) -> list[Metric]:
    """Return the rows of a site that trained by itself: its curve, and its model on its test proteins."""
    rows = [
        row
        for number, *values in alone.curve
        for row in curve_rows(spec, site, number, dict(zip(CURVE, values, strict=True)))
    ]
    return rows + test_rows(spec, site, alone.best_round, [alone.test])
