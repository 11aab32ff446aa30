"""Metrics that a site's script reports with a result: whatever it calls them, within bounds."""

from __future__ import annotations

__all__ = ["named_metrics"]

from collections.abc import Mapping

METRICS = 100
"""Metrics of one result that are noted."""

NAME_CHARACTERS = 100


def named_metrics(metrics: Mapping[str, float], *, first: str = "") -> dict[str, float]:
    """Return those of a result's metrics that are noted, sorted by name.

    A name is printable and not longer than `NAME_CHARACTERS`; of more than `METRICS` the first by name stay: a site
    can fill neither the server's disk nor the table that people read. The one that is named `first` always stays.
    That values are finite was looked at when the result came.
    """
    sound = sorted(name for name in metrics if name and len(name) <= NAME_CHARACTERS and name.isprintable())
    kept = sorted(sound, key=lambda name: name != first)[:METRICS]
    return {name: metrics[name] for name in sorted(kept)}
