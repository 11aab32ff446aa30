"""What an administrator and the server say to each other: requests, answers and files, one small struct each.

An administrator sends a request under `REQUEST`, or `SUBMIT` with the files of the jobs as one payload, one after the
other in the order of the request. The server answers under `ANSWER`, once or several times until an answer is the
last, and sends results under `RESULT_FILE`, each a payload of its own.
"""

from __future__ import annotations

__all__ = [
    "ANSWER",
    "MAX_FILES",
    "MAX_SETTINGS_CHARACTERS",
    "REQUEST",
    "RESULT_FILE",
    "SUBMIT",
    "TOPICS",
    "AbortJob",
    "Answer",
    "Download",
    "FollowLog",
    "JobFile",
    "JobInfo",
    "ListJobs",
    "Request",
    "ResultFile",
    "ShowJob",
    "Submit",
    "unpack_request",
]

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fedbio.errors import ProtocolError
from fedbio.federation.state import Progress

REQUEST, SUBMIT, ANSWER, RESULT_FILE = "admin-request", "admin-submit", "admin-answer", "admin-file"
TOPICS = frozenset((REQUEST, SUBMIT))
"""What only an administrator may send."""

MAX_FILES = 256
"""Files of one submission."""

MAX_SETTINGS_CHARACTERS = 256 * 1024
"""Of the jobs file of one submission, as JSON."""

MAX_DEPTH = 4
"""Folders above a result file, with its own name."""

_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"

Id = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
PlainName = Annotated[str, Meta(pattern=_NAME)]
JobName = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9-]{0,62}\Z")]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]


class JobFile(msgspec.Struct, frozen=True):
    """A file that jobs name, without any folder."""

    name: PlainName
    size: Size
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Enter jobs; `jobs` is a jobs file as JSON, `files` says what the payload holds."""

    id: Id
    jobs: Annotated[str, Meta(max_length=MAX_SETTINGS_CHARACTERS)]
    files: Annotated[tuple[JobFile, ...], Meta(max_length=MAX_FILES)] = ()


class ListJobs(msgspec.Struct, tag=True, frozen=True):
    """Say how all jobs stand."""

    id: Id


class ShowJob(msgspec.Struct, tag=True, frozen=True):
    """Say all that is known of a job."""

    id: Id
    name: JobName


class AbortJob(msgspec.Struct, tag=True, frozen=True):
    """End a job."""

    id: Id
    name: JobName


class FollowLog(msgspec.Struct, tag=True, frozen=True):
    """Send the events of a job, with `follow` until it is over."""

    id: Id
    name: JobName
    follow: bool = False


class Download(msgspec.Struct, tag=True, frozen=True):
    """Send what has come of a job."""

    id: Id
    name: JobName


Request = Submit | ListJobs | ShowJob | AbortJob | FollowLog | Download


_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)


def unpack_request(body: bytes) -> Request:
    """Return the request in a body; raise `ProtocolError` if it is none."""
    try:
        return _REQUESTS.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a request: {error}; do both ends run one release?") from error


class JobInfo(msgspec.Struct, frozen=True):
    """How a job stands; times are ISO 8601 or None. `settings`, `runs` and `sites` come when it is shown alone."""

    name: str
    workflow: str
    state: str
    reason: str = ""
    origin: str = ""
    submitted: str | None = None
    started: str | None = None
    finished: str | None = None
    rounds: int = 0
    runs: dict[str, Progress] = {}
    sites: tuple[str, ...] = ()
    settings: dict[str, Any] = {}


class ResultFile(msgspec.Struct, frozen=True):
    """A file of a job's results: its place below the folder of the download."""

    id: Id
    path: Annotated[tuple[PlainName, ...], Meta(min_length=1, max_length=MAX_DEPTH)]
    size: Size


class Answer(msgspec.Struct, frozen=True):
    """What the server says to a request; `error` with the exit code of a command that hears it."""

    id: Id
    last: bool = True
    error: str = ""
    code: int = 0
    jobs: tuple[JobInfo, ...] = ()
    lines: tuple[str, ...] = ()
    files: tuple[ResultFile, ...] = ()
