"""The typed contents of frames, in MessagePack, and the seal over a whole message."""

from __future__ import annotations

__all__ = [
    "MAX_TOPIC",
    "End",
    "Hello",
    "Message",
    "Open",
    "Position",
    "Refusal",
    "Welcome",
    "pack",
    "seal",
    "unpack",
]

from typing import Annotated, Literal, TypeVar

import msgspec
from blake3 import blake3
from msgspec import Meta

from fedbio.errors import ProtocolError

MAX_TOPIC = 200
"""Characters of a topic."""

Text = Annotated[str, Meta(max_length=1_000)]
Topic = Annotated[str, Meta(min_length=1, max_length=MAX_TOPIC)]
Size = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1, le=1_000)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Instance = Annotated[bytes, Meta(min_length=16, max_length=16)]
StreamKind = Literal["none", "bytes", "blob", "file", "object", "tensors", "quantized"]


class Hello(msgspec.Struct, frozen=True):
    """What the dialling end says first; its name is in its certificate, not here."""

    versions: Annotated[tuple[int, ...], Meta(min_length=1, max_length=100)]
    """Versions of the protocol that it speaks."""
    release: Text
    """Its release of fedbio, for messages to people."""
    instance: Instance
    """A random number of this process: the same one may take its own place after a break."""
    process: int
    """Its process id, for messages to people."""
    window: Count
    """Chunks of a stream that it takes unasked."""
    session: Instance | None = None
    """The session that it would resume."""


class Welcome(msgspec.Struct, frozen=True):
    """The accepting end's answer."""

    version: int
    """The highest version that both speak."""
    release: Text
    name: Text
    """The name under which the dialling end is known: its certificate's."""
    window: Count
    instance: Instance
    """A random number of the server's process."""
    session: Instance
    """A random number of the session: the one that HELLO asked for goes on, another begins anew."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a connection or a message is not taken."""

    reason: Text
    final: bool = True
    """Whether trying again is pointless."""


class Message(msgspec.Struct, frozen=True):
    """A whole small message."""

    topic: Topic
    body: bytes
    kind: StreamKind
    payload: bytes
    seal: Digest


class Open(msgspec.Struct, frozen=True):
    """The beginning of a message whose payload follows in chunks."""

    topic: Topic
    body: bytes
    kind: StreamKind
    size: Size | None
    """Bytes of the payload; None if its sender does not know them yet."""
    transfer: Digest | None = None
    """What a file is known by, so that its receiver may go on with what it has."""


class Position(msgspec.Struct, frozen=True):
    """Where a stream goes on; the frame's sequence number is the chunk that is due."""

    limit: Size
    """Chunks below this sequence number may be sent."""
    prefix: Digest | None = None
    """BLAKE3 of all chunks before, if they were received by an earlier process or connection."""


class End(msgspec.Struct, frozen=True):
    """The end of a stream."""

    size: Size
    seal: Digest


Struct = TypeVar("Struct", bound=msgspec.Struct)

pack = msgspec.msgpack.Encoder().encode


def unpack(content: bytes | memoryview, kind: type[Struct]) -> Struct:
    """Return typed content, or raise `ProtocolError` naming expected and found."""
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed {kind.__name__.lower()}: {error}") from error


def seal(topic: str, body: bytes, kind: str, payload_digest: bytes) -> bytes:
    """Return the BLAKE3 digest over a whole message: its topic, its body, and its payload's own digest."""
    return blake3(pack((topic, blake3(body).digest(), kind, payload_digest))).digest()
