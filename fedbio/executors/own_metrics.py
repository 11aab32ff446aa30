"""A site's own rows of the table of metrics: one part per model, so that a run done again replaces its own rows."""

from __future__ import annotations

__all__ = ["own_metrics", "write_metrics"]

import csv
from collections.abc import Iterator
from pathlib import Path

from fedbio.federation.workflows.study import Alone, RunSpec
from fedbio.federation.workflows.study_metrics import alone_rows
from fedbio.results import METRICS_COLUMNS, write_table

PARTS = "metrics"


def write_metrics(folder: Path, spec: RunSpec, site: str, alone: Alone) -> None:
    """Keep what a site measured of the model that it trained by itself.

    Parameters
    ----------
    folder : Path
        Of the study at this site.
    """
    write_table(folder / PARTS / f"{spec.name}.csv", METRICS_COLUMNS, alone_rows(spec, site, alone))


def own_metrics(folder: Path) -> Iterator[tuple[str, ...]]:
    """Yield the rows of all parts, in the order of their names."""
    for part in sorted((folder / PARTS).glob("*.csv")):
        with open(part, newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            next(rows)
            yield from map(tuple, rows)
