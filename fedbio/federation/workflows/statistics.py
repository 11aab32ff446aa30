"""Federated statistics: counts of all sites' proteins by class and split, and a histogram of their lengths.

Each site counts its own proteins and holds back what is small, and what would give it away (see
`fedbio.executors.suppression`); the server adds up what was told. Holding back a second count so that the first is not
found by subtraction is the complementary cell suppression of official statistics: Willenborg and de Waal 2001,
"Elements of Statistical Disclosure Control", Springer.
"""

from __future__ import annotations

__all__ = ["STATISTICS_CSV", "STATISTICS_JSON", "Statistics"]

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from fedbio.errors import FederationError, ProtocolError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Result
from fedbio.federation.workflows.counting import COUNT, SPLITS, Counted, CountSpec
from fedbio.federation.workflows.study import meta, read_meta
from fedbio.files import write_whole
from fedbio.results import write_table
from fedbio.settings_jobs import StatisticsJob

STATISTICS_JSON, STATISTICS_CSV = "statistics.json", "statistics.csv"

COLUMNS = ("table", "class", "split", "above", "up_to", "count", "sites")

Added = tuple[int | None, int]
"""A sum, None if no site has told its count, and how many sites have."""


class Statistics(Controller):
    """Asks every site for its counts and adds them up.

    ``models/JOB/statistics.json`` and ``statistics.csv`` hold the sums, for each how many sites have told theirs, and
    how many counts each site has held back. A sum is over those sites alone: the whole federation has at least as many.
    Answers that came before the server was killed are not asked for again.

    Parameters
    ----------
    runtime : Runtime
    job : StatisticsJob
    """

    def __init__(self, runtime: Runtime, job: StatisticsJob) -> None:
        super().__init__(runtime)
        self.spec = CountSpec(tuple(job.classes), tuple(job.length_bins), job.min_count)
        self.folder = runtime.workspace / "models" / runtime.job
        self.counted: dict[str, Counted] = {}

    def run(self) -> dict[str, Counted]:
        """Count, write the sums, and return what each site has told."""
        self.counted = self.state.noted(self.job, "counted", dict[str, Counted]) or {}
        sites = self.sites()
        asked = [site for site in sites if site not in self.counted]
        missing: dict[str, str] = {}
        self.broadcast_and_wait(
            COUNT, FLModel(meta=meta(self.spec)), asked, min_responses=0, on_result=self.told, missing=missing
        )
        missing |= {site: "its counts were refused" for site in asked if site not in {*self.counted, *missing}}
        least = self.runtime.desk.needed(len({*sites, *self.counted}))
        if len(self.counted) < least:
            raise FederationError(
                f"job {self.job}: {len(self.counted)} sites have counted, {least} are needed; "
                + "; ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
            )
        self.write()
        return self.counted

    def told(self, result: Result) -> None:
        """Note a site's counts, if they are counts."""
        try:
            counted = read_meta(result.model.meta, Counted)
            counted.check(self.spec)
        except ProtocolError as error:
            self.runtime.refused(result.site, COUNT, str(error))
            return
        self.counted[result.site] = counted
        self.state.note(self.job, "counted", self.counted)
        by_class, by_length = counted.held_back
        self.runtime.events.write(
            "counted", job=self.job, site=result.site, held_back_by_class=by_class, held_back_by_length=by_length,
            min_count=counted.min_count,
        )  # fmt: skip

    def by_class(self) -> Iterator[tuple[str | None, str, Added]]:
        """Yield class (None: without a label), split, and the sum over the sites."""
        rows = (*self.spec.classes, None)
        for (row, name), (column, split) in itertools.product(enumerate(rows), enumerate(SPLITS)):
            yield name, split, _add(each.classes[row][column] for each in self.counted.values())

    def by_length(self) -> Iterator[tuple[int, int | None, Added]]:
        """Yield the two ends of each bin, above the first and up to the second, and the sum over the sites."""
        ends = (0, *self.spec.length_bins, None)
        for place, (above, up_to) in enumerate(itertools.pairwise(ends)):
            yield above or 0, up_to, _add(each.lengths[place] for each in self.counted.values())

    def write(self) -> None:
        """Write the sums, as JSON and as a table."""
        content: dict[str, Any] = {
            "format": "fedbio-statistics",
            "version": 1,
            "job": self.job,
            "min_count": self.spec.min_count,
            "classes": [
                {"class": name, "split": split, "count": total, "sites": sites}
                for name, split, (total, sites) in self.by_class()
            ],
            "lengths": [
                {"above": above, "up_to": up_to, "count": total, "sites": sites}
                for above, up_to, (total, sites) in self.by_length()
            ],
            "held_back": {
                site: dict(
                    zip(("classes", "lengths", "min_count"), (*counted.held_back, counted.min_count), strict=True)
                )
                for site, counted in sorted(self.counted.items())
            },
        }
        write_table(
            self.folder / STATISTICS_CSV,
            COLUMNS,
            [
                *(("classes", name, split, None, None, *added) for name, split, added in self.by_class()),
                *(("lengths", None, None, above, up_to, *added) for above, up_to, added in self.by_length()),
            ],
        )
        write_whole(self.folder / STATISTICS_JSON, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _add(counts: Iterable[int | None]) -> Added:
    told = [count for count in counts if count is not None]
    return (sum(told) if told else None), len(told)
