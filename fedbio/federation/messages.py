"""What a server and its sites say to each other beside tasks and results: one topic and one small struct each."""

from __future__ import annotations

__all__ = [
    "ABORT",
    "BYE",
    "CALL",
    "COMMIT",
    "END",
    "FILE",
    "JOB_DONE",
    "JOIN",
    "MAX_STEP",
    "MEAN",
    "METRIC",
    "METRICS_IN_MESSAGE",
    "METRIC_KEY_CHARACTERS",
    "PART",
    "PROTOCOL",
    "RESULT",
    "SPLIT",
    "SPLIT_END",
    "TASK",
    "UPDATE",
    "WELCOME",
    "Abort",
    "Ended",
    "Exchange",
    "FileHeader",
    "JobDone",
    "Join",
    "Metric",
    "Metrics",
    "Passage",
    "Welcome",
    "pack",
    "unpack",
]

from typing import Annotated, Literal, TypeVar

import msgspec

from fedbio.errors import ProtocolError

PROTOCOL = 1
"""Version of what the structs here and in `fedbio.federation.model` mean."""

JOIN = "join"
"""Site to server, after each connection: `Join`."""
WELCOME = "welcome"
"""Server to site: `Welcome`."""
TASK = "task"
"""Server to site: a task."""
RESULT = "result"
"""Site to server: a result."""
UPDATE = "update"
"""Site to server: a result whose parameters go into a file."""
FILE = "file"
"""Server to site: `FileHeader` with the file's bytes as payload."""
JOB_DONE = "job-done"
"""Server to site: `JobDone`."""
END = "end"
"""Server to site, empty: there is nothing left to do."""
ABORT = "abort"
"""Server to site: `Abort`."""
BYE = "bye"
"""Site to server, empty: the site leaves for good."""
METRIC = "metric"
"""Site to server: `Metrics`, while a task is done."""

CALL = "lockstep-call"
"""Server to site: `Exchange`; the site shall send its part of it."""
PART = "lockstep-part"
"""Site to server: `Exchange` with the site's model as payload."""
MEAN = "lockstep-mean"
"""Server to site: `Exchange` with the mean as payload, while it is computed."""
COMMIT = "lockstep-commit"
"""Server to site: `Exchange`; the mean of this attempt counts."""

SPLIT = "split"
"""Site to server, and from there to another site: `Passage` with named tensors as payload."""
SPLIT_END = "split-end"
"""Server to site: `Ended`."""


class Join(msgspec.Struct):
    """A site presents itself. `jobs` empty means all of them; `allow` are the kinds of task that it takes."""

    version: str
    jobs: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    protocol: int = PROTOCOL


class Welcome(msgspec.Struct):
    """The server's answer to `Join`. `workflows` are those of its jobs, for what a site may load ahead."""

    federation: str
    jobs: tuple[str, ...]
    workflows: tuple[str, ...] = ()


class FileHeader(msgspec.Struct):
    """What the payload beside it is: a file's plain name, its SHA-256, and the digest of the set that it belongs to."""

    group: str
    name: str
    sha256: str


class JobDone(msgspec.Struct):
    """A job has come to its end: it is done, or it has ``failed``, or was ``aborted``, and why."""

    job: str
    state: Literal["done", "failed", "aborted"] = "done"
    reason: str = ""


class Abort(msgspec.Struct):
    """The server gives up, and why."""

    reason: str


METRICS_IN_MESSAGE = 256
"""The most numbers in one message."""
METRIC_KEY_CHARACTERS = 200
"""MLflow takes keys of 250."""
MAX_STEP = 2**53
"""Beyond it JSON's readers lose digits."""

# what TensorBoard, MLflow and file systems all take: names joined by slashes, none of which is a way up
_KEY = r"\A[A-Za-z0-9_][A-Za-z0-9_ .:-]*(/[A-Za-z0-9_][A-Za-z0-9_ .:-]*)*\Z"


class Metric(msgspec.Struct, frozen=True):
    """One number of a job; whose it is says the certificate of the site that sends it."""

    job: Annotated[str, msgspec.Meta(max_length=63)]
    key: Annotated[str, msgspec.Meta(max_length=METRIC_KEY_CHARACTERS, pattern=_KEY)]
    value: float
    step: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)] = 0


class Metrics(msgspec.Struct):
    """Numbers in the order in which they were measured, and how many before them were too many to send."""

    entries: Annotated[list[Metric], msgspec.Meta(max_length=METRICS_IN_MESSAGE)]
    left_out: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)] = 0


class Exchange(msgspec.Struct, frozen=True):
    """One exchange of parts for their mean; an attempt that fails is followed by one with fewer sites."""

    id: str
    attempt: int = 1
    run: str = ""
    """Whose model is averaged, in the words of those who hold it."""
    round: int = 0
    """The round that begins with the mean."""
    keep: tuple[int, ...] = ()
    """Earlier rounds whose models may still be asked for."""


SessionName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Passage(msgspec.Struct, frozen=True):
    """One message of a split session, in which two sites take turns; numbers count from 0."""

    session: SessionName
    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]


class Ended(msgspec.Struct, frozen=True):
    """A split session is over before its end, and why."""

    session: SessionName
    reason: str


S = TypeVar("S", bound=msgspec.Struct)


def pack(message: msgspec.Struct) -> bytes:
    """Return a message's body."""
    return msgspec.msgpack.encode(message)


def unpack(kind: type[S], body: bytes) -> S:
    """Return the message in a body.

    Raises
    ------
    ProtocolError
        If it is not one of this kind.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a {kind.__name__} message: {error}; do both ends run one release?") from error
