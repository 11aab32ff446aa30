"""What has come of a job, as files: models, metrics, and its events."""

from __future__ import annotations

__all__ = ["results_of"]

import json
from collections.abc import Iterator
from pathlib import Path

from fedbio.federation.job_files import PLAIN_NAME
from fedbio.federation.state import State
from fedbio.results import EVENTS_FILE, METRICS_COLUMNS, METRICS_FILE, write_table

BEST = "best.safetensors"
"""The best model, where a controller keeps it under this name."""

MAX_FOLDERS = 3
"""Folders above a file."""

TRACKING_FILE = "tracking.jsonl"
"""Where the server keeps what scripts have logged, if they have."""


def results_of(job: str, state: State, workspace: Path, scratch: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield the files of a job's results, each with its place in a download.

    Parameters
    ----------
    job : str
    state : State
    workspace : Path
        Of the server.
    scratch : Path
        A folder for files that are written for the purpose.

    Yields
    ------
    place : tuple of str
        Folders and name: ``("best.safetensors",)``, ``("metrics.csv",)``, ...
    file : Path
    """
    folder = workspace / "models" / job
    # where the best model is at hand, what is below are the same models by round
    yield from _below(folder, (), deep=not (folder / BEST).exists())
    metrics = state.metrics(job)
    if metrics:
        yield (METRICS_FILE,), write_table(scratch / METRICS_FILE, METRICS_COLUMNS, metrics)
    for name in (EVENTS_FILE, TRACKING_FILE):
        if (workspace / name).is_file():
            yield (name,), _lines_of(job, workspace / name, scratch / name)


def _below(folder: Path, place: tuple[str, ...], *, deep: bool) -> Iterator[tuple[tuple[str, ...], Path]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        # half-written files begin with a dot
        if PLAIN_NAME.fullmatch(path.name) and not path.is_symlink():
            if not path.is_dir():
                yield (*place, path.name), path
            elif deep and len(place) < MAX_FOLDERS:
                yield from _below(path, (*place, path.name), deep=True)


def _lines_of(job: str, log: Path, target: Path) -> Path:
    """Write the lines of a log that are about a job."""
    with open(log, "rb") as source, open(target, "wb") as file:
        for line in source:
            if job.encode() in line and line.endswith(b"\n"):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("job") == job:
                    file.write(line)
    return target
