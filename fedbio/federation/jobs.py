"""The life of a server's jobs: they wait, run in turn or several at once, and end done, failed or aborted.

What becomes of a job is in the server's `State` before anyone is told, so that a server that was killed goes on with
what was running and waiting.
"""

from __future__ import annotations

__all__ = ["REASON_CHARACTERS", "Aborted", "JobEntry", "JobQueue", "JobState"]

import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedbio.errors import FedbioError, SettingsError
from fedbio.federation.job_files import check_job_files, file_digests
from fedbio.federation.state import JobRow, State
from fedbio.settings import Job, JobsFile

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between two looks for further jobs of a server that goes on serving."""

REASON_CHARACTERS = 16_000
"""The most that is kept of why a job has failed."""

STOP_S = 5.0
"""Seconds that running jobs have to notice that the server is closing."""

FILE, ADMIN = "file", "admin"
"""Where a job comes from: the server's own jobs file, or an administrator."""


class JobState(enum.StrEnum):
    """How a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self in (JobState.DONE, JobState.FAILED, JobState.ABORTED)


class Aborted(FedbioError):
    """Somebody has ended the job, or the server is closing; no error of the job."""


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job to run: its settings, those of the file that it came with, and the folder of the files that it names."""

    job: Job
    file: JobsFile
    code: Path

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name


class JobQueue:
    """Runs jobs, so many at once.

    Parameters
    ----------
    state : State
    run : callable
        Runs a job to its end, on a thread of the queue; raises if it fails.
    interrupt : callable
        Given a job's name and an error, has `run` raise as soon as it waits for sites.
    note, over : callable
        Told each job that has ended, before and after this is in the state: its name, how, and why.
    at_once : int
        The most jobs that run at the same time.
    folder : Path
        Holds a folder for each job of an administrator, with the files that it names.

    Attributes
    ----------
    names : set of str
        The jobs that this process has run, runs or will run.
    """

    def __init__(
        self,
        state: State,
        *,
        run: Callable[[JobEntry], None],
        interrupt: Callable[[str, FedbioError], None],
        note: Callable[[str, JobState, str], None],
        over: Callable[[str, JobState, str], None],
        at_once: int = 1,
        folder: Path,
    ) -> None:
        self._state, self._run, self._interrupt = state, run, interrupt
        self._note, self._over = note, over
        self.at_once, self.folder = at_once, folder
        self._changed = threading.Condition()
        self._waiting: dict[str, JobEntry] = {}
        self._running: dict[str, threading.Thread] = {}
        self._aborting: dict[str, str] = {}
        self.names: set[str] = set()
        self._failure: BaseException | None = None
        self._stopping = False
        self.serving = False

    # what is asked of it

    def restore(self) -> None:
        """Enter the administrators' jobs that were waiting or running when the server ended."""
        with self._changed:
            for row in self._state.jobs():
                if row.origin == ADMIN and not JobState(row.state).is_over:
                    file = JobsFile.model_validate_json(row.content)
                    self._enter(JobEntry(file.jobs[0], file, self.folder / row.name))

    def offer(self, file: JobsFile, code: Path) -> None:
        """Enter the jobs of the server's own file that are not done, running or waiting yet.

        Raises
        ------
        SettingsError
            If a job was begun with other settings or files, or one of an administrator has its name.
        """
        known = {row.name: row for row in self._state.jobs()}
        digests = {job.name: file_digests(job, code) for job in file.jobs}
        with self._changed:
            for job in file.jobs:
                if job.name in known and known[job.name].origin != FILE:
                    raise SettingsError(
                        f"job {job.name!r} was submitted by an administrator; give this one another name"
                    )
                alone = file.model_copy(update={"jobs": [job]})
                done = self._state.begin(
                    job.name,
                    job.model_dump_json().encode(),
                    files=digests[job.name],
                    content=alone.model_dump_json(),
                )
                aborted = job.name in known and known[job.name].state == JobState.ABORTED
                if done or aborted or job.name in self._running or job.name in self._waiting:
                    continue
                if job.name in known and known[job.name].state == JobState.FAILED and self.serving:
                    # as often as the server is started, not as often as its file is changed
                    continue
                self._enter(JobEntry(job, file, code))

    def submit(self, file: JobsFile) -> None:
        """Enter the jobs of an administrator, whose files are in their folders.

        Raises
        ------
        SettingsError
            If a job of its name is there already; none is entered then.
        """
        with self._changed:
            self.check_new(file)
            for job in file.jobs:
                alone = file.model_copy(update={"jobs": [job]})
                self._state.begin(
                    job.name, job.model_dump_json().encode(), origin=ADMIN, content=alone.model_dump_json()
                )
                self._enter(JobEntry(job, alone, self.folder / job.name))

    def check_new(self, file: JobsFile) -> None:
        """Raise `SettingsError` if a job has the name of one that was here before."""
        known = {row.name: row.state for row in self._state.jobs()}
        if taken := [f"{job.name} ({known[job.name]})" for job in file.jobs if job.name in known]:
            raise SettingsError(
                f"there is a job of this name already: {', '.join(taken)}; give the new one another name"
            )

    def abort(self, name: str, reason: str) -> JobState:
        """End a job that waits or runs; one that runs ends as soon as it waits for sites. Return how it stands.

        Raises
        ------
        SettingsError
            If there is no such job, or it is over.
        """
        with self._changed:
            row = self.find(name)
            if JobState(row.state).is_over:
                raise SettingsError(f"job {name} is over already: {row.state}")
            if name not in self._running:
                self._waiting.pop(name, None)
                self._end(name, JobState.ABORTED, reason)
                waited = True
            else:
                self._aborting[name] = reason
                waited = False
        if waited:
            self._over(name, JobState.ABORTED, reason)
        else:
            log.info("job is being aborted job=%s reason=%s", name, reason)
            self._interrupt(name, Aborted(reason))
        return JobState(self.find(name).state)

    def wait_until_over(self, name: str, timeout_s: float) -> JobState:
        """Wait until a job is over, or for so long; return how it stands."""
        with self._changed:
            self._changed.wait_for(lambda: JobState(self.find(name).state).is_over, timeout_s)
            return JobState(self.find(name).state)

    def find(self, name: str) -> JobRow:
        """Return a job as it stands; `SettingsError` if there is none of this name."""
        rows = {row.name: row for row in self._state.jobs()}
        if name not in rows:
            raise SettingsError(f"there is no job {name} here; the jobs are {', '.join(rows) or 'none'}")
        return rows[name]

    # what it does

    def work(self, *, more: Callable[[], tuple[JobsFile, Path] | None] | None = None) -> None:
        """Run jobs until there are none, or, with `more`, until it raises.

        Parameters
        ----------
        more : callable, optional
            Called twice a second: returns the server's jobs file and its folder when the file has changed, else None.
            With it a job that fails ends alone; without it the first failure is raised, and the other jobs go on with
            the next server.
        """
        self.serving = more is not None
        looked = time.monotonic()
        while True:
            with self._changed:
                self._start_waiting()
                if self._failure is not None and not self.serving:
                    raise self._failure
                if not self._running and not self.serving:
                    return
                self._changed.wait(LOOK_S)
            if more is not None and time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                if (found := more()) is not None:
                    self._take(*found)

    def close(self) -> None:
        """Interrupt what runs; it goes on with the next server."""
        with self._changed:
            self._stopping = True
            threads = dict(self._running)
        for name in threads:
            self._interrupt(name, Aborted("the server is closing"))
        deadline = time.monotonic() + STOP_S
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _take(self, file: JobsFile, code: Path) -> None:
        try:
            self.offer(file, code)
        except FedbioError as error:
            log.warning("jobs file not taken: %s", error)

    def _enter(self, entry: JobEntry) -> None:
        self._state.move(entry.name, JobState.WAITING)
        self._waiting[entry.name] = entry
        self.names.add(entry.name)
        self._changed.notify_all()

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self.at_once and not self._stopping:
            if self._failure is not None and not self.serving:
                return
            entry = self._waiting.pop(next(iter(self._waiting)))
            # a daemon: one that computes for an hour must not keep a stopped process alive
            thread = threading.Thread(target=self._do, args=(entry,), name=f"job-{entry.name}", daemon=True)
            self._running[entry.name] = thread
            self._state.move(entry.name, JobState.RUNNING)
            thread.start()

    def _do(self, entry: JobEntry) -> None:
        """Run one job on its thread, and note how it has ended."""
        failure: BaseException | None = None
        try:
            check_job_files([entry.job], entry.code, "jobs")
            self._run(entry)
        except BaseException as error:  # raised where it can be seen, in the thread that waits
            failure = error
        state, reason = JobState.DONE, ""
        with self._changed:
            if self._stopping and failure is not None:
                # it goes on with the next server
                self._leave(entry.name, failure)
                return
            if failure is not None:
                aborted = entry.name in self._aborting
                state = JobState.ABORTED if aborted else JobState.FAILED
                reason = self._aborting[entry.name] if aborted else _reason(failure)
                if not aborted and not isinstance(failure, FedbioError):
                    log.error("job failed job=%s, a bug of fedbio", entry.name, exc_info=failure)
            self._end(entry.name, state, reason)
        try:
            # before the next job begins
            self._over(entry.name, state, reason)
        finally:
            with self._changed:
                self._leave(entry.name, failure if state is JobState.FAILED else None)

    def _leave(self, name: str, failure: BaseException | None) -> None:
        self._running.pop(name, None)
        self._failure = self._failure or failure
        self._changed.notify_all()

    def _end(self, name: str, state: JobState, reason: str) -> None:
        # who follows the job's events reads on until its state says that there are no more
        self._note(name, state, reason)
        self._state.move(name, state, reason)
        log.info("job %s job=%s%s", state, name, f" reason={reason}" if reason else "")
        self._changed.notify_all()


def _reason(failure: BaseException) -> str:
    if isinstance(failure, FedbioError):
        # it travels with every list of jobs
        return str(failure)[:REASON_CHARACTERS]
    return f"{type(failure).__name__}: {failure}; this is a bug of fedbio, the server's log says more"
