"""The typed contents of frames, in MessagePack, and the seal over a whole message."""

from __future__ import annotations

__all__ = ["Hello", "Message", "Open", "Refusal", "Welcome", "pack", "seal", "unpack"]

from typing import Annotated, TypeVar

import msgspec
from blake3 import blake3
from msgspec import Meta

from fedbio.errors import ProtocolError

Text = Annotated[str, Meta(max_length=1_000)]
Topic = Annotated[str, Meta(min_length=1, max_length=200)]
Size = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1, le=1_000)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Hello(msgspec.Struct, frozen=True):
    """What the dialling end says first; its name is in its certificate, not here."""

    versions: Annotated[tuple[int, ...], Meta(min_length=1, max_length=100)]
    """Versions of the protocol that it speaks."""
    release: Text
    """Its release of fedbio, for messages to people."""
    instance: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """A random number of this process: the same one may take its own place after a break."""
    process: int
    """Its process id, for messages to people."""
    window: Count
    """Chunks of a stream that it takes unasked."""


class Welcome(msgspec.Struct, frozen=True):
    """The accepting end's answer."""

    version: int
    """The highest version that both speak."""
    release: Text
    name: Text
    """The name under which the dialling end is known: its certificate's."""
    window: Count


class Refusal(msgspec.Struct, frozen=True):
    """Why a connection or a message is not taken."""

    reason: Text
    final: bool = True
    """Whether trying again is pointless."""


class Message(msgspec.Struct, frozen=True):
    """A whole small message."""

    topic: Topic
    body: bytes
    payload: bytes | None
    digest: Digest


class Open(msgspec.Struct, frozen=True):
    """The beginning of a message that follows in chunks: first the body, then the payload."""

    topic: Topic
    body_bytes: Size
    payload_bytes: Size | None


Struct = TypeVar("Struct", bound=msgspec.Struct)

pack = msgspec.msgpack.Encoder().encode


def unpack(content: memoryview, kind: type[Struct]) -> Struct:
    """Return typed content, or raise `ProtocolError` naming expected and found."""
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed {kind.__name__.lower()}: {error}") from error


def seal(topic: str, body: bytes | bytearray, payload_digest: bytes | None) -> bytes:
    """Return the BLAKE3 digest over a whole message: its topic, its body, and its payload's own digest."""
    return blake3(pack((topic, blake3(body).digest(), payload_digest))).digest()
