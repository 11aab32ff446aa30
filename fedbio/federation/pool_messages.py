"""What the server of a simulation and the processes that play its sites say to each other, over a pair of sockets.

Messages are MessagePack. Payloads are not among them: each is laid out once in a file of a private folder, in the form
in which it would have travelled, and mapped by those who get it.
"""

from __future__ import annotations

__all__ = [
    "Failed",
    "Left",
    "Letter",
    "Mail",
    "Orders",
    "SiteSpec",
    "Taken",
    "allow_many_files",
    "decode_mail",
    "lay_out",
    "mapped",
    "poured",
]

import errno
import mmap
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fedbio.errors import MachineError, ProtocolError
from fedbio.transport import Payload, Sink
from fedbio.transport.objects import CHUNK_BYTES


class SiteSpec(msgspec.Struct, frozen=True):
    """One site: its name, its start-up kit, its proteins, and the folder for what it keeps."""

    name: str
    kit: str
    data: str
    workspace: str


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of the pool is told first.

    Parameters
    ----------
    sites : list of SiteSpec
        Whom it plays.
    executors : str
        ``module:function`` that returns a site's executors by their names.
    prepare : str
        ``module:function`` that loads what tasks need; empty for nothing.
    folders : list of str
        Where payloads are laid out; the next one where one is full.
    prefix : str
        How the names of this process's files there begin.
    resident : int
        Sites that are kept in memory at the same time.
    memory_bytes : int
        Of memory that the process may take before it keeps fewer of them.
    allow, code, quantization : list of str
        Policy of every site, see `fedbio.federation.site.Site` and `fedbio.federation.policy.Policy`.
    device, reuse, threads, synthetic, examples
        See `fedbio.federation.executor.SiteContext`.
    """

    sites: list[SiteSpec]
    executors: str
    prepare: str = ""
    folders: list[str]
    prefix: str
    resident: int
    memory_bytes: int = 1 << 62
    allow: list[str]
    code: list[str] = []
    quantization: list[str]
    device: str = "auto"
    reuse: str | None = None
    threads: int | None = None
    synthetic: bool = False
    examples: int | None = None


class Letter(msgspec.Struct, frozen=True, tag=True):
    """A message from or to a site.

    Parameters
    ----------
    site, topic : str
    body : bytes
    kind : str
        The payload's kind on the wire; empty if there is none.
    path : str
        The file that it is laid out in.
    size : int
        Its bytes.
    number : int
        By which the sender knows the letter that it wants to hear of; 0 for none.
    """

    site: str
    topic: str
    body: bytes
    kind: str = ""
    path: str = ""
    size: int = 0
    number: int = 0


class Taken(msgspec.Struct, frozen=True, tag=True):
    """The server has taken a letter, or, with a reason, has not."""

    number: int
    refusal: str = ""


class Left(msgspec.Struct, frozen=True, tag=True):
    """A site has come to its end."""

    site: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A site has ended with an error; `own` if not only because the server has given up."""

    site: str
    reason: str
    exit_code: int
    own: bool


Mail = Letter | Taken | Left | Failed

_decoder: msgspec.msgpack.Decoder[Mail] = msgspec.msgpack.Decoder(Mail)


def decode_mail(content: bytes) -> Mail:
    """Return a message."""
    return _decoder.decode(content)


def lay_out(payload: Payload, folders: Sequence[str], prefix: str) -> str:
    """Write a payload into a new file and return its path.

    Parameters
    ----------
    payload : Payload
    folders : sequence of str
        The first one with room for it is taken.
    prefix : str
        How the file's name begins.

    Raises
    ------
    MachineError
        If none of them has.
    """
    for folder in folders:
        descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for chunk in payload.chunks():
                    while len(chunk):
                        chunk = chunk[file.write(chunk) :]
        except OSError as error:
            Path(path).unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        except BaseException:
            Path(path).unlink()
            raise
        else:
            return path
    raise MachineError(f"{', '.join(folders)}: full; free some space and run the same command again")


def mapped(letter: Letter) -> memoryview:
    """Return the payload of a letter, read-only; it outlives its file.

    Raises
    ------
    ProtocolError
        If it is not there whole: its task is over.
    """
    if not letter.size:
        return memoryview(b"")
    try:
        with open(letter.path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ProtocolError(f"the payload of {letter.topic} is gone: {error}") from error
    if len(content) != letter.size:
        raise ProtocolError(f"the payload of {letter.topic} has {len(content)} bytes, {letter.size} were announced")
    return content


def poured(content: memoryview, sink: Sink) -> Any:
    """Return what a sink makes of a payload, which it gets as from a network, chunk by chunk."""
    try:
        for begin in range(0, len(content), CHUNK_BYTES):
            sink.write(content[begin : begin + CHUNK_BYTES])
        return sink.finish()
    except BaseException:
        sink.abort()
        raise


def allow_many_files() -> None:
    """Let this process open as many files as the system allows: every site has a log and a lock."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
