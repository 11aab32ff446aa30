"""Counts of all sites added up, over real endpoints with real FASTA files, against counts computed here."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbio.errors import FederationError
from fedbio.executors.statistics import CountProteins
from fedbio.executors.suppression import suppress
from fedbio.federation import Executor, FLModel, SiteContext, Task
from fedbio.federation.workflows import statistics
from fedbio.federation.workflows.counting import SPLITS
from fedbio.proteins import Protein, partition, write_fasta
from fedbio.proteins.demo import generate
from fedbio.settings import JobsFile

SITES = ("site-1", "site-2", "site-3")
CLASSES = ["Cytoplasm", "Nucleus", "Plastid"]
BINS = [150, 250, 400]
LEAST = 5


@pytest.fixture
def shares(federation: Any) -> dict[str, list[Protein]]:
    """Write each site's proteins into its FASTA file."""
    proteins = [each for each in generate(900, seed=5) if each.target in CLASSES]
    found = partition(proteins, SITES, alpha=5.0, seed=0)
    for site, share in found.items():
        write_fasta(share, federation.folder / f"{site}.fasta")
    return found


def job(*, least: int = LEAST, limits: Mapping[str, Any] | None = None) -> JobsFile:
    what = {"workflow": "statistics", "classes": CLASSES, "length_bins": BINS, "min_count": least}
    federation = {"join_deadline_s": 20, "round_deadline_s": 20, "heartbeat_s": 0.5, **(limits or {})}
    return JobsFile.model_validate({"jobs": [what], "federation": federation})


def start(federation: Any, what: JobsFile, counts: Mapping[str, Executor] | None = None) -> tuple[Any, list[Any]]:
    server = federation.start(federation.server(what))
    sites = [
        federation.start(federation.site(name, {"count": (counts or {}).get(name) or CountProteins()}))
        for name in SITES
    ]
    return server, sites


def run(federation: Any, what: JobsFile, counts: Mapping[str, Executor] | None = None) -> None:
    server, sites = start(federation, what, counts)
    for each in (server, *sites):
        each.result(40)


def folder(federation: Any) -> Path:
    return Path(federation.folder) / "server" / "models" / "statistics"


def by_class(share: list[Protein]) -> dict[tuple[str | None, str], int]:
    counted = Counter((each.target, "validation" if each.validation else each.set) for each in share)
    return {(name, split): counted[name, split] for name in (*CLASSES, None) for split in SPLITS}


def by_length(share: list[Protein]) -> dict[int, int]:
    lengths = [len(each.sequence) for each in share]
    found = np.histogram(lengths, bins=[1, *(end + 1 for end in BINS), 10**9])[0]
    return dict(enumerate(found.tolist()))


def added(tables: Mapping[str, Mapping[Any, int]], least: int) -> dict[Any, tuple[int | None, int]]:
    """Add up what each site may tell of its table."""
    told = {site: suppress(table, least, salt=site) for site, table in tables.items()}
    found = {}
    for cell in next(iter(tables.values())):
        given = [count for table in told.values() if (count := table[cell]) is not None]
        found[cell] = (sum(given) if given else None, len(given))
    return found


class Answers(Executor):
    """A site that answers what a test says."""

    name, kind, leaves = "count", "statistics", "counts"

    def __init__(self, change: Callable[[FLModel], FLModel]) -> None:
        self.change = change
        self.calls = 0

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        self.calls += 1
        return self.change(CountProteins().execute(task, model, context))


def events(federation: Any, name: str) -> list[dict[str, Any]]:
    lines = (Path(federation.folder) / "server" / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == name]


def test_sums_are_those_of_what_each_site_may_tell(federation: Any, shares: dict[str, list[Protein]]) -> None:
    run(federation, job())
    found = json.loads((folder(federation) / "statistics.json").read_text())
    classes = added({site: by_class(share) for site, share in shares.items()}, LEAST)
    assert {(row["class"], row["split"]): (row["count"], row["sites"]) for row in found["classes"]} == classes
    lengths = added({site: by_length(share) for site, share in shares.items()}, LEAST)
    assert [(row["count"], row["sites"]) for row in found["lengths"]] == list(lengths.values())
    assert [(row["above"], row["up_to"]) for row in found["lengths"]] == [(0, 150), (150, 250), (250, 400), (400, None)]
    # the case says something: there are sums of all sites, of some, and of none
    assert {sites for _, sites in classes.values()} >= {0, 3}
    for site, share in shares.items():
        hidden = list(suppress(by_class(share), LEAST, salt=site).values()).count(None)
        assert found["held_back"][site]["classes"] == hidden


def test_without_a_minimum_the_sums_are_all_proteins(federation: Any, shares: dict[str, list[Protein]]) -> None:
    run(federation, job(least=1))
    found = json.loads((folder(federation) / "statistics.json").read_text())
    everyone = [protein for share in shares.values() for protein in share]
    assert {(row["class"], row["split"]): row["count"] or 0 for row in found["classes"]} == by_class(everyone)
    assert [row["count"] or 0 for row in found["lengths"]] == list(by_length(everyone).values())


def test_table_says_the_same(federation: Any, shares: dict[str, list[Protein]]) -> None:
    run(federation, job())
    found = json.loads((folder(federation) / "statistics.json").read_text())
    with open(folder(federation) / "statistics.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def text(value: Any) -> str:
        return "" if value is None else str(value)

    assert [(r["class"], r["split"], r["count"], r["sites"]) for r in rows if r["table"] == "classes"] == [
        tuple(text(row[key]) for key in ("class", "split", "count", "sites")) for row in found["classes"]
    ]
    assert [(r["above"], r["up_to"], r["count"], r["sites"]) for r in rows if r["table"] == "lengths"] == [
        tuple(text(row[key]) for key in ("above", "up_to", "count", "sites")) for row in found["lengths"]
    ]


@pytest.mark.usefixtures("shares")
def test_site_accounts_for_what_it_tells_as_counts(federation: Any) -> None:
    run(federation, job())
    record = json.loads((federation.folder / "site-1" / "party.json").read_text())
    assert set(record["sent"]) == {"control", "counts"}
    assert record["sent"]["counts"]["messages"] == 1


def _cell(value: Any) -> Callable[[FLModel], FLModel]:
    def change(model: FLModel) -> FLModel:
        return msgspec.structs.replace(model, meta={**model.meta, "lengths": [value, *model.meta["lengths"][1:]]})

    return change


BAD: dict[str, tuple[Callable[[FLModel], FLModel], str]] = {
    "below the minimum": (_cell(4), "a count of 4; expected 5 or more"),
    "negative": (_cell(-1), "a count of -1"),
    "beyond any count": (_cell(1 << 60), "expected 5 or more"),
    "no number": (_cell("many"), "not a Counted"),
    "too few bins": (
        lambda model: msgspec.structs.replace(model, meta={**model.meta, "lengths": [9]}),
        "4 bins, found 1",
    ),
    "no classes": (
        lambda model: msgspec.structs.replace(model, meta={**model.meta, "classes": []}),
        "4 rows by 3 splits",
    ),
    "nothing": (lambda _: FLModel(), "not a Counted"),
    "tensors": (lambda _: FLModel(params={"x": np.zeros(1)}), "tensors came where none were asked for"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_counts_are_refused_and_the_others_add_up(
    federation: Any, shares: dict[str, list[Protein]], kind: str
) -> None:
    change, reason = BAD[kind]
    run(federation, job(limits={"min_sites": 2}), {"site-2": Answers(change)})
    [refused] = events(federation, "result refused")
    assert refused["site"] == "site-2"
    assert reason in refused["reason"]
    found = json.loads((folder(federation) / "statistics.json").read_text())
    lengths = added({site: by_length(share) for site, share in shares.items() if site != "site-2"}, LEAST)
    assert [(row["count"], row["sites"]) for row in found["lengths"]] == list(lengths.values())
    assert sorted(found["held_back"]) == ["site-1", "site-3"]


@pytest.mark.usefixtures("shares")
def test_job_ends_with_the_reasons_when_too_few_have_counted(federation: Any) -> None:
    server, sites = start(federation, job(), {"site-2": Answers(_cell(4))})
    with pytest.raises(FederationError, match=r"2 sites have counted, 3 are needed; site-2: its counts were refused"):
        server.result(40)
    for each in sites:
        each.exception(40)
    assert not folder(federation).exists()


class Killed(BaseException):
    """Ends a server where no `except` of ours sees it."""


def test_killed_server_asks_nobody_twice(
    federation: Any, shares: dict[str, list[Protein]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {site: Answers(lambda model: model) for site in SITES}

    def die(self: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(statistics.Statistics, "write", die)
        server, sites = start(federation, job(), counts)
        with pytest.raises(Killed):
            server.result(40)
    again = federation.start(federation.server(job()))
    for each in (again, *sites):
        each.result(40)
    assert [each.calls for each in counts.values()] == [1, 1, 1]
    found = json.loads((folder(federation) / "statistics.json").read_text())
    lengths = added({site: by_length(share) for site, share in shares.items()}, LEAST)
    assert [(row["count"], row["sites"]) for row in found["lengths"]] == list(lengths.values())


@pytest.mark.parametrize("bins", [[200, 100], [100, 100], [0, 100]])
def test_bins_that_do_not_ascend_are_refused(bins: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend from 1 or more"):
        JobsFile.model_validate({"jobs": [{"workflow": "statistics", "length_bins": bins}]})
