"""Run one job at the server: wait for its sites, lend its controller what it needs, and account for its time."""

from __future__ import annotations

__all__ = ["JobRunner"]

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fedbio.errors import FedbioError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.desk import Desk
from fedbio.federation.filters import Chain
from fedbio.federation.job_desk import JobDesk
from fedbio.federation.jobs import JobEntry
from fedbio.federation.lockstep import Lockstep
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import Parameters
from fedbio.federation.outbox import Outbox
from fedbio.federation.party import Party
from fedbio.federation.split_relay import SplitRelay
from fedbio.federation.state import State
from fedbio.federation.tracking import Tracking
from fedbio.federation.workflows import controller_for
from fedbio.settings import ClassifyJob

log = logging.getLogger(__name__)

SHOWN = 24
"""The most sites that a line of the log names."""


@dataclass(kw_only=True)
class JobRunner:
    """What all jobs of a server share; `run` may be called on several threads, once for each job."""

    party: Party
    state: State
    desk: Desk
    outbox: Outbox
    lockstep: Lockstep
    split: SplitRelay
    tracking: Tracking
    workspace: Path
    save_model: Callable[[Parameters, msgspec.Struct], None] | None = None
    outgoing: Chain = field(default_factory=Chain)
    incoming: Chain = field(default_factory=Chain)

    def run(self, entry: JobEntry) -> None:
        """Run a job to its end.

        Raises
        ------
        FederationError
            If it cannot be completed.
        """
        job, started = entry.job, time.monotonic()
        self.party.reopen()
        desk = JobDesk(self.desk, job, sites=entry.file.sites, min_sites=entry.file.federation.min_sites)
        sites = desk.wait_for_sites(deadline_s=entry.file.federation.join_deadline_s)
        # of very many the line has their number, the event their names
        log.info("job begins job=%s sites=%s", job.name, ",".join(sites) if len(sites) <= SHOWN else len(sites))
        self.party.events.write("job begins", job=job.name, sites=list(sites))
        self.tracking.begin(job.name, job.model_dump_json())
        self._controller(entry, desk).run()
        seconds = time.monotonic() - started
        record = self.party.record
        # of a study the stages are in the record already
        stage = "study" if isinstance(job, ClassifyJob) else job.workflow
        record.seconds[stage] = record.seconds.get(stage, 0.0) + seconds
        self.party.save()
        self.party.events.write("job done", job=job.name, seconds=round(seconds, 3))

    def interrupt(self, job: str, error: FedbioError) -> None:
        """Have a job's controller end with an error where it waits for sites."""
        self.desk.interrupt(job, error)
        self.lockstep.interrupt(job, str(error))
        self.outbox.interrupt(job)

    def _controller(self, entry: JobEntry, desk: JobDesk) -> Controller:
        runtime = Runtime(
            job=entry.name,
            desk=desk,
            state=self.state,
            events=self.party.events.bound(job=entry.name),
            record=self.party.record,
            workspace=self.workspace,
            code=entry.code,
            limits=entry.file.federation,
            send_file=functools.partial(self._send_file, desk, entry.name),
            lockstep=self.lockstep,
            split=self.split,
            save_model=self.save_model,
            outgoing=self.outgoing,
            incoming=self.incoming,
        )
        return controller_for(runtime, entry.job)

    def _send_file(self, desk: JobDesk, job: str, site: str, path: Path, header: FileHeader, kind: str) -> None:
        self.outbox.send_file(site, path, header, kind, job=job, check=desk.check)
