"""The server's run time: listen, let sites join, run each job's controller, and tell everyone the end."""

from __future__ import annotations

__all__ = ["Server"]

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fedbio import __version__
from fedbio.errors import FedbioError, ProtocolError, TransportError
from fedbio.federation import messages
from fedbio.federation.admin import AdminDesk
from fedbio.federation.admin_messages import SUBMIT, TOPICS
from fedbio.federation.allocation import use_one_arena
from fedbio.federation.desk import Desk
from fedbio.federation.filters import Chain
from fedbio.federation.job_runner import JobRunner
from fedbio.federation.jobs import REASON_CHARACTERS, JobQueue, JobState
from fedbio.federation.links import ServerLink
from fedbio.federation.lockstep import Lockstep
from fedbio.federation.messages import Abort, JobDone, Join, Welcome, unpack
from fedbio.federation.model import MAX_BODY_BYTES, Parameters, Result, decode
from fedbio.federation.model_file import UpdateSink, in_file
from fedbio.federation.outbox import GOODBYE_S, Outbox
from fedbio.federation.party import Party
from fedbio.federation.said import plain, plain_result
from fedbio.federation.split_items import ItemsSink
from fedbio.federation.split_relay import SplitRelay
from fedbio.federation.state import State
from fedbio.federation.trackers import TrackerName, chosen
from fedbio.federation.tracking import Tracking
from fedbio.federation.transfers import Transfers
from fedbio.settings import JobsFile, KitFile
from fedbio.transport import (
    Credentials,
    Limits,
    Opening,
    Presence,
    Received,
    ServerEndpoint,
    Sink,
)

log = logging.getLogger(__name__)

LIBRARIES = ("grpcio", "msgspec", "numpy")
"""Whose versions go into the server's record."""

VERSION_CHARACTERS = 50
"""The most that is kept of the version that a site tells."""


@dataclass(kw_only=True)
class Server:
    """Runs a federation's jobs.

    Parameters
    ----------
    kit : KitFile
    credentials : Credentials
    jobs : JobsFile
    workspace : Path
        The folder for everything that the server keeps; a server that starts again in it goes on.
    listen : str
        ``host:port``; port 0 takes a free one.
    code : Path
        The folder of the jobs file, where the files lie that jobs name.
    save_model : callable or None
        Writes the model that a job publishes: its tensors, and what is said of them.
    outgoing, incoming : Chain
        Filters on what leaves and arrives.
    driver : str, optional
        What moves frames; by default what the kit says.
    endpoint : callable
        What reaches the sites; called as `ServerEndpoint` is.
    """

    kit: KitFile
    credentials: Credentials
    jobs: JobsFile
    workspace: Path
    listen: str
    code: Path = Path()
    save_model: Callable[[Parameters, msgspec.Struct], None] | None = None
    outgoing: Chain = field(default_factory=Chain)
    incoming: Chain = field(default_factory=Chain)
    driver: str | None = None
    endpoint: Callable[..., ServerLink] = ServerEndpoint

    def __post_init__(self) -> None:
        # a site's messages may come before all is set up; they wait for it
        self._ready = threading.Event()
        self._over = False
        self._closed = False
        self._left: set[str] = set()

    def run(self, *, more_jobs: Callable[[], JobsFile | None] | None = None) -> None:
        """Run all jobs and tell the sites that there is nothing left to do.

        Parameters
        ----------
        more_jobs : callable, optional
            Have the server go on serving: called twice a second, it returns all jobs of the jobs file when that has
            changed, else None. Without it the server ends with its jobs.

        Raises
        ------
        FederationError
            If a job cannot be completed, and the server does not go on serving; the sites are told why.
        """
        use_one_arena()
        # what is not installed is said before anybody dials
        trackers = chosen(self.jobs.tracking)
        with (
            Party.open(self.workspace, self.kit.party, "server") as party,
            Transfers() as transfers,
            self.endpoint(
                self.listen,
                self.credentials,
                spool=self.workspace / "spool",
                on_message=self._on_message,
                on_peer=self._on_peer,
                name=self.kit.party,
                sinks={
                    messages.UPDATE: self._update_sink,
                    messages.PART: self._part_sink,
                    messages.SPLIT: self._split_sink,
                    SUBMIT: self._submit_sink,
                },
                schemes=self._schemes,
                room=self._room,
                on_progress=transfers,
                limits=Limits(**self.jobs.transport.model_dump()),
                heartbeat_s=self.jobs.federation.heartbeat_s,
                driver=self.driver or self.kit.driver,
                many=() if self.kit.admin is None else (self.kit.admin,),
            ) as endpoint,
        ):
            log.info("server listening on %s", endpoint.address)
            self._begin(party, endpoint, trackers)
            try:
                self._queue.restore()
                self._queue.offer(self.jobs, self.code)
                self._note_settings()
                self._tell_done()
                self._queue.work(more=None if more_jobs is None else lambda: self._look_for_more(more_jobs))
                self._say_goodbye()
                party.finish(LIBRARIES)
            except FedbioError as error:
                self._tell_all(messages.ABORT, Abort(str(error)[:REASON_CHARACTERS]))
                party.events.write("aborted", reason=str(error))
                raise
            finally:
                self._queue.close()
                self._closed = True
                self._admin.close()
                self._outbox.close()
                self._tracking.close()
                self._desk.close()
                self._state.close()

    def give_up(self, error: FedbioError) -> None:
        """Have all jobs end with an error; from any thread."""
        self._ready.wait()
        for job in self.jobs.jobs:
            self._runner.interrupt(job.name, error)

    def _begin(self, party: Party, endpoint: ServerLink, trackers: Sequence[TrackerName]) -> None:
        self._party, self._endpoint = party, endpoint
        self._state = State(self.workspace)
        self._state.reopen()
        self._expected = tuple(self.jobs.sites or self.kit.sites)
        limits = self.jobs.federation
        self._outbox = Outbox(endpoint, party.ledger, deadline_s=limits.round_deadline_s)
        self._desk = Desk(self._expected, self._outbox.post_task, party.events, min_sites=limits.min_sites)
        self._lockstep = Lockstep(self._outbox.exchange)
        self._split = SplitRelay(self._outbox.pass_on)
        self._tracking = Tracking(
            self.workspace,
            trackers,
            federation=self.kit.federation,
            server=self.kit.party,
            events=party.events,
            sites=self._expected,
            jobs=lambda: self._queue.names,
        )
        self._runner = JobRunner(
            party=party,
            state=self._state,
            desk=self._desk,
            outbox=self._outbox,
            lockstep=self._lockstep,
            split=self._split,
            tracking=self._tracking,
            workspace=self.workspace,
            save_model=self.save_model,
            outgoing=self.outgoing,
            incoming=self.incoming,
        )
        self._queue = JobQueue(
            self._state,
            run=self._runner.run,
            interrupt=self._runner.interrupt,
            note=self._note_end,
            over=self._job_over,
            at_once=limits.jobs_at_once,
            folder=self.workspace / "jobs",
        )
        self._admin = AdminDesk(
            self.kit.admin,
            self._queue,
            self._state,
            events=party.events,
            workspace=self.workspace,
            sites=lambda job: self._desk.attendance.sites(job),
            send=endpoint.send,
        )
        party.events.write("listening", address=endpoint.address)
        self._ready.set()

    def _look_for_more(self, more_jobs: Callable[[], JobsFile | None]) -> tuple[JobsFile, Path] | None:
        jobs = more_jobs()
        if jobs is None:
            return None
        self.jobs = jobs
        self._note_settings()
        return jobs, self.code

    def _note_settings(self) -> None:
        settings = self.jobs.model_dump(mode="json")
        if settings != self._party.record.settings:
            self._party.record.settings = settings
            self._party.reopen()

    def _note_end(self, job: str, state: JobState, reason: str) -> None:
        if state is not JobState.DONE:
            self._party.events.write(f"job {state}", job=job, reason=reason)

    def _job_over(self, job: str, state: JobState, reason: str) -> None:
        """Tell the sites how a job has ended; those that are away hear it when they are back."""
        if state is JobState.FAILED and not self._queue.serving:
            return  # the server ends with it, and says so
        message = _job_done(job, state, reason)
        here = self._desk.attendance.sites()
        for site in self._desk.expected:
            if site in here:
                self._outbox.tell(site, messages.JOB_DONE, message)
            elif state is not JobState.DONE:
                self._outbox.tell_later(site, messages.JOB_DONE, message, self.jobs.transport.resume_s)

    def _tell_done(self) -> None:
        """Tell the sites that are here which jobs were done before this process began."""
        for job in self.jobs.jobs:
            if self._state.state_of(job.name) == JobState.DONE:
                self._tell_all(messages.JOB_DONE, JobDone(job.name))

    # what comes

    def _on_peer(self, site: str, presence: Presence) -> None:
        self._ready.wait()
        if self._closed or self._admin.is_admin(site):
            return
        if presence is Presence.LOST:
            self._desk.lost(site)
        elif presence is Presence.BACK:
            self._desk.back(site)
        elif presence is Presence.GONE:
            self._desk.gone(site)
            self._lockstep.gone(site)
            self._split.gone(site)

    def _on_message(self, received: Received) -> None:
        self._ready.wait()
        if self._closed:
            return
        site = received.peer
        if received.topic in TOPICS or self._admin.is_admin(site):
            self._admin.take(received)
            return
        try:
            if received.topic == messages.RESULT:
                tensors = {} if received.payload is None else received.payload.tensors()
                result = plain_result(decode(Result, received.body, tensors), site)
                self._desk.answered(result, size=_size(received), digest=received.digest)
            elif received.topic == messages.UPDATE:
                result = decode(Result, received.body, {})
                model = result.model if received.payload is None else in_file(result.model, received.payload)
                result = msgspec.structs.replace(plain_result(result, site), model=model)
                self._desk.answered(result, size=_size(received), digest=received.digest)
            elif received.topic == messages.PART:
                self._lockstep.take(received)
            elif received.topic == messages.SPLIT:
                self._split.take(received)
            elif received.topic == messages.METRIC:
                self._tracking.take(site, received.body)
            elif received.topic == messages.JOIN:
                self._on_join(site, unpack(Join, received.body))
            elif received.topic == messages.BYE:
                self._left.add(site)
                self._desk.gone(site)
                self._lockstep.gone(site)
                self._split.gone(site)
            else:
                raise ProtocolError(f"unknown topic {received.topic!r}")
        except TransportError as error:
            self._desk.unreadable(site, str(error), _task_of(received))
        except FedbioError as error:
            self._desk.unreadable(site, f"its tensors cannot be read: {error}", _task_of(received))

    def _schemes(self, opening: Opening) -> Collection[str]:
        """Return the quantization schemes in which a message's model may come: the one that its task asked for."""
        self._ready.wait()
        try:
            return self._desk.schemes(opening.peer, decode(Result, opening.body, {}).task)
        except ProtocolError:
            return ()

    def _room(self, opening: Opening) -> int:
        """Return how many bytes a message may bring: a result what its task asks for, and a long body."""
        if opening.topic != messages.RESULT:
            return self.jobs.transport.max_payload_bytes
        self._ready.wait()
        # a long body is in the payload: nobody can say yet which task it is of
        task = _named_task(opening.body)
        most = MAX_BODY_BYTES + self._desk.room(opening.peer, task)
        if opening.size is not None and opening.size > most:
            self._desk.unreadable(opening.peer, f"it has {opening.size} bytes, at most {most} were asked for", task)
        return most

    def _update_sink(self, opening: Opening) -> UpdateSink:
        """Return where the parameters of a result go, if somebody waits for them."""
        self._ready.wait()
        site = opening.peer
        try:
            result = decode(Result, opening.body, {})
        except ProtocolError as error:
            self._desk.unreadable(site, str(error))
            raise
        expected = self._desk.expecting(msgspec.structs.replace(result, site=site))
        return UpdateSink(
            self.workspace / "spool",
            expected.manifest or {},
            lambda reason: self._desk.unreadable(site, reason, result.task),
            schemes=self._schemes(opening),
        )

    def _submit_sink(self, opening: Opening) -> Sink:
        self._ready.wait()
        return self._admin.sink(opening)

    def _part_sink(self, opening: Opening) -> Sink:
        self._ready.wait()
        return self._lockstep.sink(opening)

    def _split_sink(self, opening: Opening) -> ItemsSink:
        self._ready.wait()
        return self._split.sink(opening)

    def _on_join(self, site: str, join: Join) -> None:
        names = list(dict.fromkeys([*(job.name for job in self.jobs.jobs), *(row.name for row in self._state.jobs())]))
        join = msgspec.structs.replace(join, version=plain(join.version, VERSION_CHARACTERS))
        unknown = sorted(set(join.jobs) - set(names))
        reason = ""
        if join.protocol != messages.PROTOCOL:
            reason = f"fedbio {join.version} at {site} and {__version__} at the server do not fit; install one release"
        elif site not in self._expected:
            reason = f"{site} is not expected; the sites of these jobs are {', '.join(self._expected)}"
        elif unknown:
            reason = f"there is no job {plain(', '.join(unknown), 200)} here; the jobs are {', '.join(names)}"
        if reason:
            log.warning("site turned away site=%s reason=%s", site, reason)
            self._party.events.write("site turned away", site=site, reason=reason)
            return self._outbox.tell(site, messages.ABORT, Abort(reason))
        self._state.joined(site, join.version)
        workflows = sorted({job.workflow for job in self.jobs.jobs if not join.jobs or job.name in join.jobs})
        self._outbox.tell(site, messages.WELCOME, Welcome(self.kit.federation, tuple(names), tuple(workflows)))
        self._left.discard(site)
        self._desk.joined(site, join)
        if self._over:
            return self._outbox.tell(site, messages.END)
        for row in self._state.jobs():
            if row.name in join.jobs and JobState(row.state).is_over:
                self._outbox.tell(site, messages.JOB_DONE, _job_done(row.name, row.state, row.reason))
        return None

    def _tell_all(self, topic: str, message: msgspec.Struct | None = None) -> None:
        for site in self._desk.attendance.sites():
            self._outbox.tell(site, topic, message)

    def _say_goodbye(self) -> None:
        self._over = True
        self._tell_all(messages.END)
        deadline = time.monotonic() + GOODBYE_S
        known = set(self._state.known_sites())
        # a site says goodbye and hangs up; to hang up first would look like a break to it
        while (known - self._left or self._admin.sites_among(self._endpoint.peers())) and time.monotonic() < deadline:
            time.sleep(0.02)
        if missing := sorted(known - self._left):
            log.warning("sites did not say goodbye sites=%s", ",".join(missing))


def _size(received: Received) -> int:
    return len(received.body) + received.size


def _task_of(received: Received) -> str:
    """Return which task a message that cannot be read wants to answer; empty if nobody can say."""
    return _named_task(received.body) if received.topic in (messages.RESULT, messages.UPDATE) else ""


def _named_task(body: bytes) -> str:
    """Return which task a result is of; empty if nobody can say."""
    with contextlib.suppress(ProtocolError):
        return decode(Result, body, {}).task
    return ""


def _job_done(job: str, state: str, reason: str) -> JobDone:
    return msgspec.convert({"job": job, "state": str(state), "reason": reason}, JobDone)
