"""The server's end of what administrators ask: who may, what is taken in, and what goes out."""

from __future__ import annotations

__all__ = ["AdminDesk"]

import functools
import hashlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pydantic

from fedbio.errors import FedbioError, ProtocolError, RefusedError, SettingsError, TransportError
from fedbio.federation.admin_messages import (
    ANSWER,
    RESULT_FILE,
    AbortJob,
    Answer,
    Download,
    FollowLog,
    JobFile,
    JobInfo,
    ListJobs,
    Request,
    ResultFile,
    ShowJob,
    Submit,
    unpack_request,
)
from fedbio.federation.job_desk import rounds_of
from fedbio.federation.job_files import files_of
from fedbio.federation.job_results import results_of
from fedbio.federation.jobs import JobQueue, JobState
from fedbio.federation.messages import pack
from fedbio.federation.state import JobRow, State
from fedbio.files import whole_file
from fedbio.results import EventLog
from fedbio.settings import JobsFile
from fedbio.settings_files import describe_problems
from fedbio.settings_jobs import CustomJob
from fedbio.transport import FilePayload, Opening, Payload, Received, Sink, SpoolSink

log = logging.getLogger(__name__)

ABORT_S = 10.0
"""Seconds that an aborted job has to end before its administrator is answered."""

SEND_S = 60.0
"""Seconds in which an administrator has to take an answer."""

FOLLOW_S = 0.2
"""Seconds between two looks for new events."""

LINES, LINES_BYTES = 500, 256 << 10
"""Events in one answer, and the bytes after which there is another."""

LISTED_CHARACTERS = 500
"""Of the reason of a job's end, in a list of jobs."""

FOLLOWERS = 64
"""The most requests that are answered over a longer time at once: logs that are followed, and downloads."""

Send = Callable[[str, str, bytes, Payload | None, float | None], object]


class AdminDesk:
    """Serves administrators.

    Parameters
    ----------
    admin : str or None
        The name in the certificates of those who may; nobody may if it is None.
    queue : JobQueue
    state : State
    events : EventLog
        The server's; who has asked for what is an event.
    workspace : Path
    sites : callable
        Given a job's name, returns its sites that are here.
    send : callable
        Sends to a peer: name, topic, body, payload, seconds that it may take.
    """

    def __init__(
        self,
        admin: str | None,
        queue: JobQueue,
        state: State,
        *,
        events: EventLog,
        workspace: Path,
        sites: Callable[[str], Sequence[str]],
        send: Send,
    ) -> None:
        self._admin, self._queue, self._state = admin, queue, state
        self._events, self._workspace, self._sites, self._send = events, workspace, sites, send
        self._closed = threading.Event()
        self._slots = threading.Semaphore(FOLLOWERS)
        self._entering = threading.Lock()

    def close(self) -> None:
        """End the logs that are followed."""
        self._closed.set()

    def is_admin(self, peer: str) -> bool:
        """Whether a peer is an administrator; several of its processes may be here, each a peer ``NAME:ID``."""
        return self._admin is not None and peer.partition(":")[0] == self._admin

    def sites_among(self, peers: Iterable[str]) -> list[str]:
        """Return the peers that are no administrators."""
        return [peer for peer in peers if not self.is_admin(peer)]

    def sink(self, opening: Opening) -> Sink:
        """Return where the files of a submission go; refuse before the first byte what is not one.

        Raises
        ------
        ProtocolError
            If the peer may not submit, or the payload is not of the size of the files that the request names.
        """
        if not self.is_admin(opening.peer):
            self._refuse(opening.peer, opening.topic)
            raise ProtocolError(f"{opening.peer} may not submit jobs; only {self._admin or 'nobody'} may")
        request = unpack_request(opening.body)
        if not isinstance(request, Submit) or opening.size != sum(each.size for each in request.files):
            raise ProtocolError("the files of a submission must have the sizes that it names")
        return SpoolSink(self._workspace / "spool", opening.size)

    def take(self, received: Received) -> None:
        """Deal with a message of an administrator, or with one that only an administrator may send."""
        peer = received.peer
        try:
            request = unpack_request(received.body)
        except ProtocolError as error:
            log.warning("request not readable peer=%s reason=%s", peer, error)
            return self._events.write("request refused", peer=peer, reason=str(error)[:500])
        if not self.is_admin(peer):
            self._refuse(peer, received.topic)
            return self._answer(peer, _error(request, RefusedError(f"{peer} is no administrator of this server")))
        if isinstance(request, (AbortJob, FollowLog, Download)):
            # they take their time, and other messages of this peer shall not wait for them
            if not self._slots.acquire(blocking=False):
                return self._answer(peer, _error(request, SettingsError("the server is busy; try again later")))
            work = functools.partial(self._serve_slowly, peer, request)
            threading.Thread(target=work, name="admin", daemon=True).start()
            return None
        return self._serve(peer, request, received)

    def _refuse(self, peer: str, topic: str) -> None:
        log.warning("request refused peer=%s topic=%s", peer, topic)
        self._events.write("request refused", peer=peer, topic=topic, reason="not an administrator")

    def _serve_slowly(self, peer: str, request: AbortJob | FollowLog | Download) -> None:
        try:
            self._serve(peer, request, None)
        finally:
            self._slots.release()

    def _serve(self, peer: str, request: Request, received: Received | None) -> None:
        try:
            match request:
                case Submit():
                    answers: Iterable[Answer] = [self._submit(request, received)]
                case ListJobs():
                    answers = [Answer(request.id, jobs=tuple(_line(row) for row in self._state.jobs()))]
                case ShowJob():
                    answers = [self._show(request)]
                case AbortJob():
                    answers = [self._abort(request)]
                case FollowLog():
                    answers = self._follow(request)
                case Download():
                    answers = self._download(peer, request)
            for answer in answers:
                self._answer(peer, answer)
        except TransportError as error:
            log.info("administrator not answered peer=%s reason=%s", peer, error)
        except FedbioError as error:
            self._answer(peer, _error(request, error))
        except OSError as error:
            log.warning("request failed peer=%s reason=%s", peer, error)
            self._answer(peer, _error(request, SettingsError(f"the server cannot do it: {error.strerror}")))

    def _answer(self, peer: str, answer: Answer) -> None:
        try:
            self._send(peer, ANSWER, pack(answer), None, SEND_S)
        except TransportError as error:
            if not answer.last:
                raise  # nobody listens to the rest
            log.info("administrator not answered peer=%s reason=%s", peer, error)

    def _submit(self, request: Submit, received: Received | None) -> Answer:
        """Enter jobs whose files are all here: first the files, then the rows that make them jobs."""
        try:
            file = JobsFile.model_validate_json(request.jobs)
        except pydantic.ValidationError as error:
            raise describe_problems("jobs", error, JobsFile) from error
        if not file.jobs:
            raise SettingsError("jobs: there are none; name at least one job")
        if own := [job.name for job in file.jobs if isinstance(job, CustomJob)]:
            raise RefusedError(
                f"job {', '.join(own)}: a controller of one's own runs in the server's process and is not taken from "
                "afar; whoever runs the server can name it in the server's jobs file"
            )
        content = memoryview(b"") if received is None or received.payload is None else received.payload.content
        named = {name for job in file.jobs for name in files_of(job)}
        if named != {each.name for each in request.files} or len(named) != len(request.files):
            raise SettingsError(f"jobs: the files that came are not those that they name: {', '.join(sorted(named))}")
        with self._entering:
            self._queue.check_new(file)
            for job in file.jobs:
                folder = self._queue.folder / job.name
                # what a submission left that was not entered before the server was killed
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                wanted = files_of(job)
                for name, piece in _split(content, request.files):
                    if name in wanted:
                        _write(folder / name, piece)
            self._queue.submit(file)
        names = [job.name for job in file.jobs]
        files = {each.name: each.sha256 for each in request.files}
        for name in names:
            self._events.write("job submitted", job=name, by=self._admin, files=files)
        rows = [row for row in self._state.jobs() if row.name in names]
        return Answer(request.id, jobs=tuple(_info(row) for row in rows))

    def _show(self, request: ShowJob) -> Answer:
        row = self._queue.find(request.name)
        info = msgspec.structs.replace(
            _info(row),
            runs=self._state.runs(row.name),
            sites=tuple(self._sites(row.name)),
            settings=_settings(row),
        )
        return Answer(request.id, jobs=(info,))

    def _abort(self, request: AbortJob) -> Answer:
        self._events.write("abort asked for", job=request.name, by=self._admin)
        state = self._queue.abort(request.name, f"aborted by {self._admin}")
        if not state.is_over:
            self._queue.wait_until_over(request.name, ABORT_S)
        return Answer(request.id, jobs=(_info(self._queue.find(request.name)),))

    def _follow(self, request: FollowLog) -> Iterator[Answer]:
        """Yield the events of a job as they are written."""
        self._queue.find(request.name)
        with open(self._events.path, "rb") as file:
            rest = b""
            while True:
                over = self._closed.is_set() or JobState(self._queue.find(request.name).state).is_over
                # read after the look: what is said of its end is in
                while chunk := file.read(1 << 20):
                    *lines, rest = (rest + chunk).split(b"\n")
                    found = [text for line in lines if (text := _event_of(line, request.name)) is not None]
                    for lines_of_one in _batches(found):
                        yield Answer(request.id, last=False, lines=tuple(lines_of_one))
                if over or not request.follow:
                    yield Answer(request.id)
                    return
                self._closed.wait(FOLLOW_S)

    def _download(self, peer: str, request: Download) -> Iterator[Answer]:
        """Send the files of a job's results, and yield at the end which they are."""
        self._queue.find(request.name)
        sent: list[ResultFile] = []
        spool = self._workspace / "spool"
        spool.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=spool, prefix="download-") as folder:
            for path, source in results_of(request.name, self._state, self._workspace, Path(folder)):
                pinned = Path(folder) / f"pinned-{len(sent)}"
                try:
                    # a job that runs may replace a file meanwhile, or take it away; what is linked stays
                    pinned.hardlink_to(source)
                except FileNotFoundError:
                    continue
                payload = FilePayload(pinned)
                header = ResultFile(request.id, path, payload.size or 0)
                self._send(peer, RESULT_FILE, pack(header), payload, None)
                sent.append(header)
        self._events.write("results sent", job=request.name, to=self._admin, files=len(sent))
        yield Answer(request.id, files=tuple(sent))


def _split(content: memoryview, files: Sequence[JobFile]) -> Iterator[tuple[str, memoryview]]:
    """Yield the files of a payload, each as its digest says."""
    begin = 0
    for each in files:
        piece = content[begin : begin + each.size]
        begin += each.size
        if len(piece) != each.size or hashlib.sha256(piece).hexdigest() != each.sha256:
            raise SettingsError(f"file {each.name}: what came is not what was announced; submit again")
        yield each.name, piece


def _write(path: Path, content: memoryview) -> None:
    # a view: a model file is not copied through memory
    with whole_file(path) as beside, open(beside, "wb") as file:
        file.write(content)


def _event_of(line: bytes, job: str) -> str | None:
    """Return an event as text if it is one of a job."""
    if job.encode() not in line:
        return None
    try:
        event: Any = json.loads(line)
    except ValueError:
        return None  # the last line of a process that was killed
    return line.decode() if isinstance(event, dict) and event.get("job") == job else None


def _batches(lines: Sequence[str]) -> Iterator[list[str]]:
    """Share out events to answers, neither too many nor too long."""
    batch: list[str] = []
    size = 0
    for line in lines:
        if len(line) > LINES_BYTES:
            # of very many sites, each with its reason; the file at the server has it whole
            event = json.loads(line)
            line = json.dumps({key: event.get(key) for key in ("time", "party", "event", "job")} | {"bytes": len(line)})
        if batch and (len(batch) == LINES or size + len(line) > LINES_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield batch


def _settings(row: JobRow) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = json.loads(row.content)["jobs"] if row.content else []
    return jobs[0] if jobs else {}


def _line(row: JobRow) -> JobInfo:
    """Return a job for a list of many."""
    return msgspec.structs.replace(_info(row), reason=row.reason[:LISTED_CHARACTERS])


def _info(row: JobRow) -> JobInfo:
    file = JobsFile.model_validate_json(row.content) if row.content else None
    job = file.jobs[0] if file else None
    return JobInfo(
        name=row.name,
        workflow=job.workflow if job else "",
        state=row.state,
        reason=row.reason,
        origin=row.origin,
        submitted=row.submitted,
        started=row.started,
        finished=row.finished,
        rounds=rounds_of(job) if job else 0,
    )


def _error(request: Request, error: FedbioError) -> Answer:
    return Answer(request.id, error=str(error)[:10_000], code=error.exit_code)
