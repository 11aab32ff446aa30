"""Write ``summary.json``: the headline figures of a run for programs to read."""

from __future__ import annotations

__all__ = ["summarize", "write_summary"]

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from fedbio.files import write_whole
from fedbio.report.bootstrap import Estimate
from fedbio.report.study import Study

SUMMARY_FILE = "summary.json"


def summarize(study: Study) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Returns
    -------
    dict
        ``{"accuracy": {MLP: {"local_mean", "federated", "central", "majority", "gain"}}, "best": MLP,
        "seconds": {STAGE: s}, "encoder": {...}, "bytes_left": {SITE: {KIND: b}}}`` where each accuracy is
        ``{"value", "low", "high"}`` or None. A stage's seconds are those of the party that took longest.
    """
    seconds: dict[str, float] = {}
    for party in study.run.parties:
        for stage, taken in party.seconds.items():
            seconds[stage] = max(taken, seconds.get(stage, 0.0))
    return {
        "accuracy": {
            model: {
                "local_mean": _number(accuracy.local),
                "federated": _number(accuracy.federated),
                "central": _number(accuracy.central),
                "majority": _number(accuracy.majority),
                "gain": _number(accuracy.gain),
            }
            for model, accuracy in study.accuracies.items()
        },
        "best": study.best,
        "seconds": seconds,
        "encoder": msgspec.to_builtins(study.run.encoder),
        "bytes_left": {
            site.party: {kind: traffic.bytes for kind, traffic in site.sent.items()} for site in study.run.sites
        },
    }


def write_summary(study: Study) -> Path:
    """Write ``summary.json`` into the run's folder and return its path."""
    path = study.run.folder / SUMMARY_FILE
    write_whole(path, json.dumps(summarize(study), indent=1, allow_nan=False) + "\n")
    return path


def _number(estimate: Estimate | None) -> dict[str, float] | None:
    if estimate is None or not math.isfinite(estimate.value):
        return None
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
