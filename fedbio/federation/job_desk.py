"""What one job sees of the desk: its own sites, how many of them it needs, and whether it may go on."""

from __future__ import annotations

__all__ = ["JobDesk", "rounds_of"]

from collections.abc import Callable, Sequence

import msgspec

from fedbio.federation.acceptance import Expectation
from fedbio.federation.attendance import GATHER_S
from fedbio.federation.desk import Desk
from fedbio.federation.model import Result, Task
from fedbio.federation.quantization import EXACT, Travel
from fedbio.settings import ClassifyJob, Job
from fedbio.settings_jobs import SplitJob


class JobDesk:
    """The desk, narrowed to one job. Several jobs share one `Desk`, which knows who is here.

    Parameters
    ----------
    desk : Desk
        The one that the transport reports to.
    job : Job
    sites : sequence of str, optional
        The sites of this job; by default all that are expected.
    min_sites : int, optional
        How many of them a round needs; by default as many as the desk says.

    Attributes
    ----------
    expected : tuple of str
        The sites of this job, here or not, sorted.
    """

    def __init__(
        self, desk: Desk, job: Job, *, sites: Sequence[str] | None = None, min_sites: int | None = None
    ) -> None:
        self._desk, self._job = desk, job
        self.expected = tuple(site for site in desk.expected if sites is None or site in sites)
        self.min_sites = desk.min_sites if min_sites is None else min_sites

    def sites(self, job: str = "") -> tuple[str, ...]:
        """Return the sites that are here and take part, sorted by name."""
        return tuple(site for site in self._desk.attendance.sites(job or self._job.name) if site in self.expected)

    def allows(self, site: str, kind: str) -> bool:
        """Whether a site said that it takes tasks of a kind."""
        return self._desk.attendance.allows(site, kind)

    def arrivals(self, site: str) -> int:
        """Return how many processes of a site have presented themselves."""
        return self._desk.attendance.arrivals(site)

    def needed(self, asked: int) -> int:
        """Return how many of `asked` sites have to answer."""
        return asked if self.min_sites is None else min(self.min_sites, asked)

    def check(self) -> None:
        """Raise what the job was interrupted with."""
        self._desk.check(self._job.name)

    def wait_for_sites(
        self, job: str = "", *, deadline_s: float, gather_s: float = GATHER_S, all_of: Sequence[str] | None = None
    ) -> tuple[str, ...]:
        """Wait until enough sites of the job are here, or all those of `all_of`; see `Attendance.wait_for`."""
        wanted = self.expected if all_of is None else all_of
        least = len(wanted) if all_of is not None or self.min_sites is None else self.min_sites
        return self._desk.attendance.wait_for(
            job or self._job.name, wanted, least=least, deadline_s=deadline_s, gather_s=gather_s, check=self.check
        )

    def ask(
        self,
        task: Task,
        sites: Sequence[str],
        expected: Expectation,
        *,
        min_responses: int,
        deadline_s: float,
        travel: Travel = EXACT,
        on_result: Callable[[Result], None] | None = None,
        missing: dict[str, str] | None = None,
    ) -> list[Result]:
        """Hand a task to sites and wait; it says what the sites' policies may ask of the job. See `Desk.ask`."""
        return self._desk.ask(
            msgspec.structs.replace(task, workflow=self._job.workflow, rounds=rounds_of(self._job)),
            sites,
            expected,
            min_responses=min_responses,
            deadline_s=deadline_s,
            travel=travel,
            on_result=on_result,
            missing=missing,
        )


def rounds_of(job: Job) -> int:
    """Return how many rounds of training a job has at most; 0 for one that trains nothing."""
    if isinstance(job, ClassifyJob):
        return job.training.rounds
    if isinstance(job, SplitJob):
        return job.epochs
    return int(getattr(job, "rounds", 0))
