"""The site's run time: dial out, take the tasks that its policy allows, answer each once, account for what leaves."""

from __future__ import annotations

__all__ = ["Site"]

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedbio import __version__
from fedbio.errors import (
    FedbioError,
    FederationError,
    FormatError,
    PeerUnreachable,
    TransportError,
)
from fedbio.federation import messages
from fedbio.federation.answers import Answer, Answers, Heard, content_of, failure
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.filters import Chain
from fedbio.federation.held import Held
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.links import SiteLink
from fedbio.federation.lockstep_site import LockstepSite
from fedbio.federation.messages import Abort, JobDone, Join, Welcome, pack, unpack
from fedbio.federation.model import Parameters, Status, Task, decode
from fedbio.federation.party import Party
from fedbio.federation.policy import Policy
from fedbio.federation.quantization import scheme_of
from fedbio.federation.received_files import keep_file
from fedbio.federation.reporter import Reporter
from fedbio.federation.site_tasks import Tasks
from fedbio.federation.split_site import SplitSite
from fedbio.federation.transfers import Transfers
from fedbio.settings import SCHEMES, KitFile, Transport
from fedbio.transport import Credentials, Limits, ObjectPayload, Payload, Presence, Received, SiteEndpoint
from fedbio.transport.receiver import SinkFactory

log = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0
"""Seconds between two saves of the record while tasks are done."""

SEND_TRIES = 3
"""How often a result is sent that is not accepted, or whose connection was lost for good."""

GOODBYE_S = 10.0
"""Seconds for a last word to a server that may have left already."""

METRICS_S = 10.0
"""Seconds in which the server has to take a message with metrics."""

LIBRARIES = ("grpcio", "h5py", "msgspec", "numpy", "torch")
"""Whose versions go into the site's record."""


@dataclass(kw_only=True)
class Site:
    """Takes part in a federation's jobs.

    Parameters
    ----------
    kit : KitFile
    credentials : Credentials
    workspace : Path
        The folder for everything that the site keeps.
    data : Path
        The site's own proteins.
    executors : mapping of str to Executor
        By the task's name.
    allow : sequence of str
        Kinds of task that the site takes.
    jobs : sequence of str
        Jobs to take part in; empty means all.
    server : str or None
        The server's address, where it differs from the kit's.
    connect_deadline_s : float
        Seconds to keep trying to reach the server.
    heartbeat_s : float
        Seconds between two signs of life of the server.
    quantization : sequence of str
        Schemes in which models may come and leave.
    transport : Transport
        What is accepted from the server, and how long this site waits.
    policy : Policy
        Which jobs and which code its operator lets in.
    examples : int or None
        How many examples it registers for a job of a script; None counts its proteins.
    prepare : callable or None
        Loads what tasks of the workflows that it is given need, unless it is there: called when the server says what
        its jobs are, so that it is done while others are waited for, and before each task. It must not hold the
        interpreter for long: a site that shows no life meanwhile would be taken for gone.
    ahead : bool
        Whether scripts are started as soon as they are here, and not with their first task.
    driver : str, optional
        What moves frames; by default what the kit says.
    """

    kit: KitFile
    credentials: Credentials
    workspace: Path
    data: Path
    executors: Mapping[str, Executor]
    allow: Sequence[str]
    labels: Path | None = None
    reuse: Path | None = None
    device: str = "auto"
    threads: int | None = None
    synthetic: bool = False
    jobs: Sequence[str] = ()
    server: str | None = None
    connect_deadline_s: float = 3600.0
    heartbeat_s: float = 5.0
    quantization: Sequence[str] = SCHEMES
    transport: Transport = field(default_factory=Transport)
    policy: Policy = field(default_factory=Policy)
    examples: int | None = None
    prepare: Callable[[Collection[str]], None] | None = None
    ahead: bool = False
    outgoing: Chain = field(default_factory=Chain)
    incoming: Chain = field(default_factory=Chain)
    driver: str | None = None

    def __post_init__(self) -> None:
        self._inbox: queue.SimpleQueue[Task | Received] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._taken: dict[str, Heard] = {}
        """Tasks that wait or are being done, by id."""
        self._arrival = 0
        self._over = False
        self._told_to_stop = False
        self._dropped: set[str] = set()
        self._held = Held(self.workspace / "held")
        self._answers = Answers(self._held)
        self._lockstep = LockstepSite(
            lambda topic, body, payload: self._send(topic, body, payload, "model" if payload else "control"),
            part=self._held.part,
            store=self._held.store,
            adopt=self._held.adopt,
        )
        self._split = SplitSite(self._send_split, check=lambda: self._endpoint.wait(0))
        self._reporter = Reporter(lambda body: self._send(messages.METRIC, body, None, "metrics", METRICS_S))
        self._saved = 0.0

    def run(self) -> None:
        """Do tasks until the server says that there are no more.

        Raises
        ------
        PeerUnreachable, RefusedError
            If the server is not reached, or does not take this site, or this site does not take the server.
        FederationError
            If the server gives up, with its reason; or the error of this site's own task, if that was the reason.
        """
        with Party.open(self.workspace, self.kit.party, "site") as party, Transfers() as transfers:
            endpoint = SiteEndpoint(
                self.server or self.kit.server,
                self.credentials,
                spool=self.workspace / "spool",
                on_message=self.hear,
                on_connection=self.greet,
                sinks=self.sinks,
                schemes=lambda opening: self.quantization,
                on_progress=transfers,
                connect_deadline_s=self.connect_deadline_s,
                limits=Limits(**self.transport.model_dump()),
                heartbeat_s=self.heartbeat_s,
                driver=self.driver or self.kit.driver,
            )
            with endpoint:
                self.begin(party, endpoint)
                try:
                    while self._handle(self._next()):
                        pass
                    self.leave()
                finally:
                    self.close()
            party.finish(LIBRARIES)
        log.info("done, everything this site keeps is in %s", self.workspace)

    # what `run` does, one by one, for who brings the messages of several sites itself

    def begin(self, party: Party, endpoint: SiteLink) -> None:
        """Begin, or go on: `greet` and `hear` wait for this."""
        self._party, self._endpoint = party, endpoint
        self._tasks = Tasks(
            executors=self.executors,
            allow=self.allow,
            quantization=self.quantization,
            policy=self.policy,
            incoming=self.incoming,
            outgoing=self.outgoing,
            prepare=self.prepare,
            party=party,
            held=self._held,
        )
        self._jobs_left = set(self.jobs)
        self._context = SiteContext(
            site=self.kit.party,
            workspace=self.workspace,
            data=self.data,
            labels=self.labels,
            reuse=self.reuse,
            device=self.device,
            threads=self.threads,
            synthetic=self.synthetic,
            policy=self.policy,
            examples=self.examples,
            ahead=self.ahead,
            on_metric=self._reporter.add,
            identity=SiteIdentity(self.credentials) if isinstance(self.credentials, Credentials) else None,
            outgoing=self.outgoing,
            split=self._split,
            record=party.record,
            events=party.events,
        )
        self._ready.set()

    def attend(self) -> bool:
        """Deal with all that was heard and return; False if it was the last there will be.

        Raises
        ------
        FederationError, or the error of this site's own task
            If the server has given up.
        """
        while not self._inbox.empty():
            if not self._handle(self._inbox.get()):
                return False
        return True

    @property
    def at_rest(self) -> bool:
        """Whether another object could go on in this one's workspace, and nothing would be lost."""
        resting = all(executor.at_rest for executor in self.executors.values())
        keeps = self._dropped or self._tasks.failure is not None or self._answers.keeps
        exchanges = self._held.keeps or self._lockstep.keeps
        return resting and not keeps and not exchanges and self._inbox.empty()

    @property
    def sinks(self) -> dict[str, SinkFactory]:
        """Where payloads of some topics go while they arrive; those of others are whole when they are heard."""
        return {messages.MEAN: self._lockstep.sink, messages.SPLIT: self._split.sink}

    @property
    def failure(self) -> FedbioError | None:
        """What this site's own task failed with last."""
        return self._tasks.failure

    def leave(self) -> None:
        """Say goodbye."""
        self._reporter.close()
        self._say_goodbye()

    def put_away(self) -> None:
        """Give back what this object holds, see `at_rest`."""
        self._reporter.close()
        self.close()

    def close(self) -> None:
        """Stop what still runs here; nothing is heard any more."""
        self._over = True
        self._close_executors()

    # on the transport's threads

    def greet(self, presence: Presence) -> None:
        """Take note of what has become of the server; to one that was not here before, this site presents itself."""
        self._ready.wait()
        if self._over:
            return
        self._party.events.write(f"server {presence.value}")
        if presence is Presence.GONE:
            self._split.broken("the server was started anew, or has given this site up")
            self._stop_if_lost()
        if presence is Presence.ARRIVED:
            self._arrival += 1
            join = Join(version=__version__, jobs=tuple(self.jobs), allow=tuple(self.allow))
            try:
                self._send(messages.JOIN, pack(join), None, "control")
            except TransportError as error:
                # a new process of the server is announced as well
                log.info("not joined: %s", error)

    def _stop_if_lost(self) -> None:
        """Stop what is being done, perhaps for hours, if nobody will take its result; the main thread says why."""
        try:
            self._endpoint.wait(0)
        except FedbioError:
            self._told_to_stop = True
            threading.Thread(target=self._close_executors, name="close-executors", daemon=True).start()

    def hear(self, received: Received) -> None:
        """Take a message from any thread, and leave it to the main one; what cannot wait is done here."""
        self._ready.wait()
        if self._over:
            return None
        if received.topic in (messages.CALL, messages.MEAN, messages.COMMIT):
            # also in the middle of a task: the other sites wait
            self._lockstep.take(received)
            return None
        if received.topic in (messages.SPLIT, messages.SPLIT_END):
            # a task waits for it
            self._split.take(received)
            return None
        # known at once, also in the middle of a task: the server does not wait for its answer any more
        if received.topic in (messages.END, messages.ABORT):
            self._told_to_stop = True
            self._split.broken("the server has no more to do")
            # it may take a while, and the task that is done meanwhile shall not
            threading.Thread(target=self._close_executors, name="close-executors", daemon=True).start()
        if received.topic == messages.JOB_DONE and (done := unpack(JobDone, received.body)).state != "done":
            self._drop(done)
        if received.topic != messages.TASK:
            return self._inbox.put(received)
        try:
            task = decode(Task, received.body, {} if received.payload is None else received.payload.tensors())
        except FedbioError as error:
            log.warning("task not readable reason=%s", error)
            return self._party.events.write("task not readable", reason=str(error))
        with self._lock:
            # a task that is being done, or waits here, is answered when it is done, however often it comes
            if task.id not in self._taken:
                content = content_of(task, digest=received.digest, has_payload=received.payload is not None)
                self._taken[task.id] = Heard(content, self._arrival)
                self._inbox.put(task)
        return None

    # on the main thread

    def _next(self) -> Task | Received:
        while True:
            try:
                return self._inbox.get(timeout=1.0)
            except queue.Empty:
                # raises if the server was lost for good
                self._endpoint.wait(0)

    def _handle(self, message: Task | Received) -> bool:
        """Deal with one message; return False if it was the last one."""
        if isinstance(message, Task):
            if message.job not in self._dropped:
                self._do(message)
        elif message.topic == messages.WELCOME:
            welcome = unpack(Welcome, message.body)
            log.info("joined federation=%s as=%s jobs=%s", welcome.federation, self.kit.party, ",".join(welcome.jobs))
            if self.prepare is not None:
                self.prepare(welcome.workflows)
        elif message.topic == messages.FILE:
            keep_file(message, self._context)
        elif message.topic == messages.JOB_DONE:
            return self._end(unpack(JobDone, message.body))
        elif message.topic == messages.END:
            return False
        elif message.topic == messages.ABORT:
            reason = unpack(Abort, message.body).reason
            self._party.events.write("aborted", reason=reason)
            # the site whose own task failed leaves with its own error
            raise self._tasks.failure or FederationError(f"the server has given up: {reason}")
        else:
            log.warning("unknown message skipped topic=%s", message.topic)
        return True

    def _end(self, done: JobDone) -> bool:
        """Forget a job; return False if there is none left for this site."""
        log.info("job %s job=%s reason=%s", done.state, done.job, done.reason)
        self._party.events.write(f"job {done.state}", job=done.job, **({"reason": done.reason} if done.reason else {}))
        self._held.forget(done.job)
        self._answers.forget(done.job)
        if done.job in self._jobs_left and done.state != "done":
            raise self._tasks.failure or FederationError(f"job {done.job} has {done.state}: {done.reason}")
        self._jobs_left.discard(done.job)
        return not self.jobs or bool(self._jobs_left)

    def _close_executors(self) -> None:
        for executor in self.executors.values():
            executor.close()

    def _drop(self, done: JobDone) -> None:
        """Stop what is done or waits for a job that has come to an early end; called while a task may be done."""
        self._dropped.add(done.job)
        for executor in self.executors.values():
            executor.abandon(done.job)

    def _do(self, task: Task) -> None:
        with self._lock:
            heard = self._taken[task.id]
        answer = self._answers.kept(task, heard)
        if answer is not None:
            log.info("answer given again task=%s round=%d", task.name, task.model.current_round)
        else:
            try:
                result = self._tasks.do(task, self._context)
            except Exception as error:
                # a full disk or a bug of ours: the server learns of it, and this process ends with it
                self._reply(failure(task.id, f"{type(error).__name__}; its log says more"))
                raise
            if result.status is not Status.REFUSED:
                self._party.reopen()
            executor = self.executors.get(task.name)
            answer = self._answers.make(task, result, heard, leaves=executor.leaves if executor else "control")
        if task.job not in self._dropped:
            self._reply(answer)
        with self._lock:
            self._taken.pop(task.id, None)
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._saved = time.monotonic()
            self._party.save()

    def _reply(self, answer: Answer) -> None:
        # a job that is done has all its metrics
        self._reporter.flush()
        refusal = ""
        for _ in range(SEND_TRIES):
            if self._told_to_stop:
                return None
            try:
                return self._send(answer.topic, answer.body, answer.payload, answer.kind)
            except FormatError as error:
                refusal = f"its model cannot be sent: {error}"
                break
            except TransportError as error:
                log.info("result not delivered, it is kept reason=%s", error)
                refusal = "" if isinstance(error, PeerUnreachable) else str(error)
                self._endpoint.wait(1.0)
        if refusal and answer.payload is not None:
            # the server need not wait for it until its deadline
            log.error("result given up reason=%s", refusal)
            self._party.events.write("result given up", reason=refusal)
            self._reply(failure(answer.task, refusal))
        return None

    def _say_goodbye(self) -> None:
        try:
            self._send(messages.BYE, b"", None, "control", timeout_s=GOODBYE_S)
        except TransportError as error:
            log.info("the server has left first reason=%s", error)

    def _send(
        self, topic: str, body: bytes, payload: Payload | None, kind: str, timeout_s: float | None = None
    ) -> None:
        if payload is None:
            self._party.ledger.add(kind, len(body), topic=topic)
        else:
            self._party.ledger.add("metrics", len(body), topic=topic)
            self._party.ledger.add(kind, payload.size or 0, topic=topic, scheme=scheme_of(payload))
        self._endpoint.send(topic, body, payload, timeout_s)

    def _send_split(self, body: bytes, items: Parameters) -> None:
        size = sum(each.nbytes for each in items.values())
        self._party.ledger.add("activations", len(body) + size, topic=messages.SPLIT)
        self._endpoint.send(messages.SPLIT, body, ObjectPayload(items))
