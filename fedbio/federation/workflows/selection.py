"""Which of a run's models is the best: by the mean of a metric over the sites' examples."""

from __future__ import annotations

__all__ = ["is_better", "mean_metric", "unreported"]

import difflib
import math
from collections.abc import Collection, Mapping, Sequence

from fedbio.federation.model import Result
from fedbio.settings import ModelSelection

TIE = 1e-9
"""Metrics nearer than this are equal: they are ratios of counts, averaged in floating point."""


def mean_metric(metric: str, results: Sequence[Result], counts: Mapping[str, int]) -> float | None:
    """Average a metric over all examples of the sites that measured it; None if there are none, or no finite mean.

    Parameters
    ----------
    metric : str
    results : sequence of Result
    counts : mapping of str to int
        The sites' registered numbers of examples: what a site says of itself with a result does not count.
    """
    measured = [
        (each.model.metrics[metric], counts.get(each.site, 0)) for each in results if metric in each.model.metrics
    ]
    total = sum(count for _, count in measured)
    mean = sum(value * count for value, count in measured) / total if total else math.nan
    # values that are too large for a sum are none either
    return mean if math.isfinite(mean) else None


def unreported(metric: str, reported: Collection[str]) -> str:
    """Say that no site reports the metric by which the best model is chosen, and what sites do report."""
    near = difflib.get_close_matches(metric, list(reported), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}" if near else ""
    return (
        f"no site reports {metric!r}; reported: {', '.join(sorted(reported)) or 'nothing'}{hint} (selection.metric); "
        "as long as none does, each round counts as the best one, and patience ends nothing"
    )


def is_better(selection: ModelSelection, value: float | None, best: float | None) -> bool:
    """Whether a model takes the place of the best one so far; one that nobody measured follows only its like."""
    if value is None or best is None:
        return best is None
    gain = value - best if selection.best == "highest" else best - value
    return gain > TIE or (selection.ties == "last" and gain >= -TIE)
