"""Gather what the parties of a run left in their workspaces into one account of the run."""

from __future__ import annotations

__all__ = ["Run", "collect"]

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedbio.errors import DataError, FormatError
from fedbio.files import write_whole
from fedbio.report.tables import read_events, read_table
from fedbio.results import (
    EVENTS_FILE,
    FEDERATED,
    MAP_FILE,
    METRICS_COLUMNS,
    METRICS_FILE,
    PARTY_FILE,
    PREDICTIONS_COLUMNS,
    PREDICTIONS_FILE,
    ClassCounts,
    EncoderInfo,
    MapPoint,
    Metric,
    PartyRecord,
    Prediction,
    read_party,
    write_table,
)

STUDIES = "studies"
"""Folder of further studies in a party's workspace."""

_ROLES = {"server": 0, "site": 1, "central": 2}


@dataclass(frozen=True)
class Run:
    """All parties' records, curves and predictions of one run, without repetition.

    Parameters
    ----------
    folder : Path
        The run's folder, or one party's own workspace.
    parties : tuple of PartyRecord
        Server first, then sites by name and number, central last.
    metrics, predictions, points : tuple
        The parties' rows; where two parties tell the same, the first party's.
    own : bool
        True if `folder` is one site's own workspace.
    """

    folder: Path
    parties: tuple[PartyRecord, ...]
    metrics: tuple[Metric, ...]
    predictions: tuple[Prediction, ...]
    points: tuple[MapPoint, ...]
    own: bool

    @property
    def sites(self) -> tuple[PartyRecord, ...]:
        """The sites' records."""
        return tuple(party for party in self.parties if party.role == "site")

    @property
    def classes(self) -> list[str]:
        """The federation's classes in order."""
        return next(party.classes for party in self.parties if party.classes)

    @property
    def encoder(self) -> EncoderInfo | None:
        """The encoder, as the first party that knows it describes it."""
        return next((party.encoder for party in self.parties if party.encoder), None)

    @property
    def counts(self) -> dict[str, ClassCounts]:
        """Class counts by site: the sites' own, and for sites that are not here as the server published them."""
        published = {name: counts for party in self.parties for name, counts in party.federation.items()}
        own = {site.party: site.data.counts for site in self.sites if site.data}
        return dict(sorted({**published, **own}.items(), key=lambda item: natural(item[0])))

    @property
    def chosen(self) -> str | None:
        """The MLP with the best validation accuracy, as the parties recorded it."""
        return next((party.best for party in self.parties if party.best and party.role != "central"), None)


def natural(name: str) -> tuple[str | int, ...]:
    """Sort key that puts ``site-2`` before ``site-10``."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def collect(folder: Path, job: str | None = None) -> Run:
    """Read a run and, if it has several parties, write their tables as one into the run's folder.

    Parameters
    ----------
    folder : Path
        A run's folder with one workspace per party, or one site's own workspace.
    job : str, optional
        A further study of this run, whose results are in ``studies/JOB/`` of every party's workspace; the tables go to
        ``studies/JOB/`` of the run's folder.

    Returns
    -------
    Run
        ``metrics.csv``, ``predictions.csv`` and ``events.jsonl`` have appeared in `folder`.

    Raises
    ------
    DataError
        If there is no run, or a part of it is missing or damaged: the message names the file and the remedy.
    """
    below = "" if job is None else f"{STUDIES}/{job}/"
    own = (folder / PARTY_FILE).is_file()
    found = [folder / below / PARTY_FILE] if own else sorted(folder.glob(f"*/{below}{PARTY_FILE}"))
    if job is not None and not any(path.is_file() for path in found):
        further = sorted({path.parent.name for path in folder.glob(f"**/{STUDIES}/*/{PARTY_FILE}")})
        there = f"there are {', '.join(further)}" if further else "leave --job out for the only one"
        raise DataError(f"{folder}: no party has results of a further study {job}; {there}")
    if not found:
        raise DataError(
            f"{folder}: no {PARTY_FILE} here or in a folder below; give the folder of a finished run, for example "
            "results/demo"
        )
    records = {path.parent: read_party(path) for path in found}
    workspaces = sorted(records, key=lambda path: (_ROLES[records[path].role], natural(records[path].party)))
    parties = [records[workspace] for workspace in workspaces]
    for workspace, party in zip(workspaces, parties, strict=True):
        _check_complete(party, workspace)
    folder = folder / below
    run = Run(
        folder=folder,
        parties=tuple(parties),
        metrics=tuple(_merged_metrics(workspaces)),
        predictions=tuple(_merged_predictions(parties, workspaces)),
        points=tuple(_merged_points(workspaces)),
        own=own,
    )
    if not any(row.party == FEDERATED for row in run.predictions):
        raise DataError(
            f"{folder}: no party here has predictions of the federated model; a report is written for a run with its "
            "sites, or at a site, once the federated job is done"
        )
    if not own:
        write_table(folder / METRICS_FILE, METRICS_COLUMNS, run.metrics)
        write_table(folder / PREDICTIONS_FILE, PREDICTIONS_COLUMNS, run.predictions)
        told = workspaces if job is None else [path.parent.parent for path in workspaces]
        events = sorted(event for path in _present(told, EVENTS_FILE) for event in read_events(path))
        write_whole(folder / EVENTS_FILE, b"".join(line + b"\n" for _, line in events))
    return run


def _check_complete(party: PartyRecord, workspace: Path) -> None:
    """A party that owns proteins must have its tables, or a remark that says why not."""
    if party.role == "server" or party.remarks:
        return
    for name in (METRICS_FILE, PREDICTIONS_FILE):
        if not (workspace / name).is_file():
            raise DataError(f"{workspace / name}: missing; {party.party} has not finished, run the job again")
    if not party.classes:
        raise FormatError(f"{workspace / PARTY_FILE}: classes: none named; run the job again")


def _present(workspaces: list[Path], name: str) -> list[Path]:
    return [path for workspace in workspaces if (path := workspace / name).is_file()]


def _merged_metrics(workspaces: list[Path]) -> list[Metric]:
    merged: dict[tuple[object, ...], Metric] = {}
    for path in _present(workspaces, METRICS_FILE):
        for _, row in read_table(path, Metric):
            merged.setdefault(row[:-1], row)
    return sorted(merged.values(), key=lambda row: (natural(row.party), natural(row.model), row[2:]))


def _merged_predictions(parties: list[PartyRecord], workspaces: list[Path]) -> Iterator[Prediction]:
    classes = {name for party in parties for name in party.classes}
    targets: dict[str, tuple[str, Path]] = {}
    seen: set[tuple[object, ...]] = set()
    for path in _present(workspaces, PREDICTIONS_FILE):
        for line, row in read_table(path, Prediction):
            for label in (row.target, row.predicted):
                if label not in classes:
                    raise DataError(f"{path}:{line}: class {label!r} is not one of the run's; run the job again")
            target, first = targets.setdefault(row.id, (row.target, path))
            if target != row.target:
                raise DataError(
                    f"{path}:{line}: protein {row.id!r} is {row.target} here and {target} in {first}: the sites tested "
                    "on different proteins; report on each site's own folder instead"
                )
            key = (row.id, row.party, row.model, row.seed)
            if key not in seen:
                seen.add(key)
                yield row


def _merged_points(workspaces: list[Path]) -> Iterator[MapPoint]:
    placed: set[str] = set()
    for path in _present(workspaces, MAP_FILE):
        sites: set[str] = set()
        for _, point in read_table(path, MapPoint):
            if point.site not in placed:
                sites.add(point.site)
                yield point
        placed |= sites
