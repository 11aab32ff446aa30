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
]

import resource

import msgspec


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
        ``module:function`` that loads what tasks of some workflows need; empty for nothing.
    workflows : list of str
        Those of the jobs.
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
    workflows: list[str] = []
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
    once : bool
        Whether it is the only one with this payload: who opens the file removes it.
    """

    site: str
    topic: str
    body: bytes
    kind: str = ""
    path: str = ""
    size: int = 0
    number: int = 0
    once: bool = False


class Taken(msgspec.Struct, frozen=True, tag=True):
    """A letter has been taken by whom it was for, or, with a reason, has not."""

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


def allow_many_files() -> None:
    """Let this process open as many files as the system allows: every site has a log and a lock."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
