"""What a probe measured, as entries of JSON and as tables for people: a part of `scl_probe.py`."""

from __future__ import annotations

__all__ = ["Account"]

import sys
from dataclasses import dataclass, field
from typing import Any

from _probe import Fitted, Scores, interval


@dataclass
class Account:
    """What was measured, for machines and for people."""

    results: list[dict[str, Any]] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def add(self, rows: str, features: str, fitted: Fitted, scores: Scores | None, limit: float | None = None) -> None:
        """Add one model's figures; without scores those of validation alone."""
        about = {"rows": rows, "features": features, "model": fitted.model}
        title = f"{features}, {fitted.model}, {rows}"
        self._entry(f"{title}: validation accuracy", fitted.validation, about | {"split": "validation"})
        cells = [rows, features, fitted.model, f"{fitted.validation:.3f}"]
        for name, values in (scores or {}).items():
            value, low, high = interval(values)
            entry = self._entry(f"{title}: {name}", value, about | {"split": "test"}, low=low, high=high)
            if limit is not None and name == "accuracy":
                entry |= {"limit": round(limit, 4), "ratio": round(value / limit, 3)}
            cells.append(f"{value:.3f} ({low:.3f}-{high:.3f})")
        cells += ["not looked at"] * (7 - len(cells))
        self.models.append(f"| {' | '.join(cells)} |")
        print(self.models[-1], file=sys.stderr, flush=True)

    def add_difference(self, rows: str, what: str, first: Scores, second: Scores) -> dict[str, Any]:
        """Add how much better the first is than the second, resampled in pairs; return the entry of the accuracy."""
        cells, entries = [rows, what], []
        for name in first:
            value, low, high = interval(first[name] - second[name])
            about = {"rows": rows, "split": "test"}
            entries.append(self._entry(f"{what}, {rows}: difference of {name}", value, about, low=low, high=high))
            cells.append(f"{value:+.3f} ({low:+.3f} to {high:+.3f})")
        self.differences.append(f"| {' | '.join(cells)} |")
        print(self.differences[-1], file=sys.stderr, flush=True)
        return entries[0]

    def _entry(self, name: str, value: float, about: dict[str, str], **ends: float) -> dict[str, Any]:
        entry = {"name": name, "value": round(value, 4), "unit": "share", "limit": None, "ratio": None, "goal": None}
        entry |= {"met": True, **about, **{key: round(end, 4) for key, end in ends.items()}}
        self.results.append(entry)
        return entry

    def table(self) -> str:
        """Return both tables in Markdown."""
        head = ["trained on", "features", "model", "validation Q10", "test Q10", "test macro F1", "test MCC"]
        lines = [f"| {' | '.join(head)} |", "|---|---|---|--:|--:|--:|--:|", *self.models]
        if self.differences:
            head = ["trained on", "difference on test, 95 % interval of paired resamples", "Q10", "macro F1", "MCC"]
            lines += ["", f"| {' | '.join(head)} |", "|---|---|--:|--:|--:|", *self.differences]
        return "\n".join(lines)
