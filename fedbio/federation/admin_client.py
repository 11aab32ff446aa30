"""The administrator's end: ask a running server over its transport, and wait for what it says."""

from __future__ import annotations

__all__ = ["AdminClient"]

import queue
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from fedbio.errors import (
    FedbioError,
    FederationError,
    InputError,
    PeerUnreachable,
    ProtocolError,
    RefusedError,
    SettingsError,
)
from fedbio.federation.admin_messages import (
    ANSWER,
    MAX_FILES,
    MAX_SETTINGS_CHARACTERS,
    REQUEST,
    RESULT_FILE,
    SUBMIT,
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
)
from fedbio.federation.job_files import check_job_files
from fedbio.federation.messages import pack, unpack
from fedbio.files import sha256_file
from fedbio.settings import JobsFile, KitFile
from fedbio.transport import BytesPayload, Credentials, FileSink, Opening, Payload, Presence, Received, SiteEndpoint

ANSWER_S = 60.0
"""Seconds that the server has for an answer, if it does not send results meanwhile."""

_ERRORS: dict[int, type[FedbioError]] = {2: InputError, 4: RefusedError}


class AdminClient:
    """Talks to a server as one of its administrators; a context manager.

    Parameters
    ----------
    kit : KitFile
    credentials : Credentials
    server : str, optional
        The server's address, where it differs from the kit's.
    connect_deadline_s : float
        Seconds to keep trying to reach it.
    driver : str, optional
        What moves frames; by default what the kit says.

    Raises
    ------
    PeerUnreachable, RefusedError
        If the server is not reached, or does not take this certificate.
    """

    def __init__(
        self,
        kit: KitFile,
        credentials: Credentials,
        *,
        server: str | None = None,
        connect_deadline_s: float = 10.0,
        driver: str | None = None,
    ) -> None:
        self._answers: queue.SimpleQueue[Answer | FedbioError] = queue.SimpleQueue()
        self._folder: Path | None = None
        self._expected = ""
        self._heard = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="fedbio-job-")
        self._endpoint = SiteEndpoint(
            server or kit.server,
            credentials,
            spool=self._scratch.name,
            on_message=self._on_message,
            on_connection=self._on_connection,
            sinks={RESULT_FILE: self._result_sink},
            on_progress=lambda progress: self._listen(),
            connect_deadline_s=connect_deadline_s,
            driver=driver or kit.driver,
        )

    def __enter__(self) -> Self:
        self._endpoint.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._endpoint.close()
        self._scratch.cleanup()

    # what can be asked

    def submit(self, jobs: JobsFile, folder: Path, source: str | Path = "jobs") -> tuple[JobInfo, ...]:
        """Enter jobs, with the files in a folder that they name; return how they stand.

        Raises
        ------
        SettingsError
            If a file is missing, or there are too many.
        InputError
            If the server does not take them, with its reason.
        """
        paths = check_job_files(jobs.jobs, folder, source)
        content = jobs.model_dump_json(exclude_unset=True)
        if len(paths) > MAX_FILES or len(content) > MAX_SETTINGS_CHARACTERS:
            raise SettingsError(f"{source}: too large to be submitted at once; submit the jobs in several files")
        files = tuple(JobFile(name, path.stat().st_size, sha256_file(path)) for name, path in paths.items())
        size = sum(each.size for each in files)
        payload = BytesPayload(_chunks(paths.values()), size=size) if files else None
        request = Submit(_new_id(), content, files)
        return self._ask(request, SUBMIT if files else REQUEST, payload).jobs

    def jobs(self) -> tuple[JobInfo, ...]:
        """Return how all jobs stand, in the order in which they came."""
        return self._ask(ListJobs(_new_id())).jobs

    def show(self, name: str) -> JobInfo:
        """Return all that is known of a job."""
        return self._ask(ShowJob(_new_id(), name)).jobs[0]

    def abort(self, name: str) -> JobInfo:
        """End a job; return how it stands then."""
        return self._ask(AbortJob(_new_id(), name)).jobs[0]

    def log(self, name: str, *, follow: bool = False) -> Iterator[str]:
        """Yield the events of a job, each as one JSON object; with `follow` as they are written, until it is over."""
        request = FollowLog(_new_id(), name, follow)
        self._post(request, REQUEST, None)
        while True:
            answer = self._next(request, None if follow else ANSWER_S)
            yield from answer.lines
            if answer.last:
                return

    def download(self, name: str, folder: Path) -> list[Path]:
        """Put what has come of a job into a folder; return the files.

        Raises
        ------
        FederationError
            If not all of them have come.
        """
        request = Download(_new_id(), name)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._expected = folder, request.id
        self._post(request, REQUEST, None)
        sent = self._next(request, ANSWER_S).files
        paths = [folder.joinpath(*each.path) for each in sent]
        if missing := [str(path) for path, each in zip(paths, sent, strict=True) if _size(path) != each.size]:
            raise FederationError(f"{', '.join(missing)}: did not come whole; download again")
        return paths

    # the conversation

    def _ask(self, request: Request, topic: str = REQUEST, payload: Payload | None = None) -> Answer:
        self._post(request, topic, payload)
        return self._next(request, ANSWER_S)

    def _post(self, request: Request, topic: str, payload: Payload | None) -> None:
        self._listen()
        self._endpoint.send(topic, pack(request), payload, None if payload else ANSWER_S)

    def _next(self, request: Request, silence_s: float | None) -> Answer:
        """Return the next answer to a request; what belongs to an earlier one is passed over."""
        self._listen()
        while True:
            try:
                answer = self._answers.get(timeout=1.0)
            except queue.Empty:
                self._endpoint.wait(0)  # raises if the server was lost for good
                if silence_s is not None and time.monotonic() - self._heard > silence_s:
                    raise PeerUnreachable(f"the server has not answered within {silence_s:g} s; ask again") from None
                continue
            if isinstance(answer, FedbioError):
                raise answer
            if answer.id != request.id:
                continue
            if answer.error:
                raise _ERRORS.get(answer.code, FederationError)(answer.error)
            return answer

    def _listen(self) -> None:
        self._heard = time.monotonic()

    def _on_message(self, received: Received) -> None:
        self._listen()
        if received.topic == ANSWER:
            try:
                self._answers.put(unpack(Answer, received.body))
            except ProtocolError as error:
                self._answers.put(error)

    def _on_connection(self, presence: Presence) -> None:
        if presence is Presence.GONE:
            # a new process knows nothing of what was asked
            self._answers.put(PeerUnreachable("the server was started anew meanwhile; ask again"))

    def _result_sink(self, opening: Opening) -> FileSink:
        """Return where a result goes: below the folder of the download, whatever the server calls it."""
        header = unpack(ResultFile, opening.body)
        if self._folder is None or header.id != self._expected or opening.size != header.size:
            raise ProtocolError("a file that was not asked for")
        path = self._folder.joinpath(*header.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileSink(path, opening)


def _new_id() -> str:
    return uuid.uuid4().hex


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _chunks(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
