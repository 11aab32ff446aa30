"""Encode and decode frames, the one unit that every driver moves.

======  =====  ================  ====================================================
offset  bytes  field             meaning
======  =====  ================  ====================================================
0       4      magic             ``FBIO``
4       1      version           of this table, 1
5       1      kind              see `Kind`; a receiver skips kinds that it does not know
6       2      reserved          0
8       4      stream            which stream the frame belongs to; 0 is the connection
12      4      sequence          number of a chunk in its stream, from 0
16      4      payload length    at most 1 MiB
20      4      payload CRC32     of the payload alone: a chunk for many peers is summed once
24      4      header CRC32      of bytes 0 to 23
28      n      payload           raw bytes in a chunk, MessagePack elsewhere
======  =====  ================  ====================================================

All numbers are unsigned and little endian.
"""

from __future__ import annotations

__all__ = [
    "HEADER_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_PAYLOAD_BYTES",
    "VERSION",
    "Frame",
    "Kind",
    "assemble",
    "decode",
    "decode_all",
    "encode",
    "header",
    "make",
    "payload_bytes",
]

import enum
import struct
from collections.abc import Iterable
from typing import NamedTuple

from isal.isal_zlib import crc32  # the same sum as zlib's, at three times its speed

from fedbio.errors import ProtocolError

MAGIC = b"FBIO"
VERSION = 1
_FIELDS = struct.Struct("<4sBBHIIII")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
MAX_PAYLOAD_BYTES = 1 << 20
MAX_FRAME_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1
    """The dialling end's first frame: who speaks, and which versions."""
    WELCOME = 2
    """The answer: the version that both speak from here on."""
    REFUSED = 3
    """The answer that ends the connection, with the reason."""
    PING = 4
    PONG = 5
    MESSAGE = 6
    """A whole small message in one frame."""
    OPEN = 7
    """The beginning of a stream: topic, kind and sizes. Its sequence number is 1 if it was sent before: its receiver,
    who may never have seen it, then answers with a POSITION."""
    CHUNK = 8
    """The next bytes of a stream."""
    END = 9
    """The end of a stream: its size and the digest of the whole."""
    CANCEL = 10
    """The sender gives a stream up."""
    CREDIT = 11
    """The receiver takes chunks below this sequence number."""
    ACCEPTED = 12
    """The receiver has the whole message and its digest is right."""
    REJECTED = 13
    """The receiver does not take a message, with the reason."""
    POSITION = 14
    """The receiver has all chunks below this sequence number; go on from there."""
    RESTART = 15
    """The sender begins its stream again at chunk 0: what the receiver has is not the beginning of it."""
    BYE = 16
    """The sender closes for good: what was under way will not be resumed."""


class Frame(NamedTuple):
    """One frame; the payload is a view of the bytes that arrived, or of those that shall leave."""

    kind: int
    stream: int
    sequence: int
    payload: bytes | memoryview
    crc: int
    """CRC32 of the payload."""

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return HEADER_BYTES + len(self.payload)


def make(kind: Kind, stream: int = 0, sequence: int = 0, payload: bytes | memoryview = b"") -> Frame:
    """Return a frame that carries `payload`, without a copy of it."""
    return Frame(kind, stream, sequence, payload, crc32(payload))


def header(frame: Frame) -> bytes:
    """Return the `HEADER_BYTES` that go before a frame's payload."""
    fields = _FIELDS.pack(MAGIC, VERSION, frame.kind, 0, frame.stream, frame.sequence, len(frame.payload), frame.crc)
    return fields + _CRC.pack(crc32(fields))


def encode(frames: Iterable[Frame]) -> bytes:
    """Return the bytes of frames that leave together; payloads are copied once."""
    parts: list[bytes | memoryview] = []
    for frame in frames:
        parts += (header(frame), frame.payload)
    return b"".join(parts)


def payload_bytes(head: bytes | memoryview, most: int = MAX_PAYLOAD_BYTES) -> int:
    """Return how many bytes follow a header, after checking all its fields: call it before memory is taken.

    Raises
    ------
    ProtocolError
        If the `HEADER_BYTES` are not a sound header of this version, or announce more than `most` bytes.
    """
    if len(head) != HEADER_BYTES:
        raise ProtocolError(f"frame of {len(head)} bytes is shorter than its header of {HEADER_BYTES}")
    magic, version, _, _, _, _, length, _ = _FIELDS.unpack_from(head)
    if magic != MAGIC:
        raise ProtocolError(f"frame begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(
            f"frame of version {version}, this release reads version {VERSION}; install the same release at both ends"
        )
    (crc,) = _CRC.unpack_from(head, _FIELDS.size)
    if crc32(head[: _FIELDS.size]) != crc:
        raise ProtocolError("frame was damaged on the way: its header's CRC32 does not match")
    if length > most:
        raise ProtocolError(f"frame declares {length} bytes, at most {most} are allowed")
    return int(length)


def assemble(head: bytes | memoryview, payload: bytes | memoryview) -> Frame:
    """Return the frame of a header that `payload_bytes` has passed and the payload that followed it.

    Raises
    ------
    ProtocolError
        If the payload was damaged on the way.
    """
    _, _, kind, _, stream, sequence, _, crc = _FIELDS.unpack_from(head)
    if crc32(payload) != crc:
        raise ProtocolError("frame was damaged on the way: its payload's CRC32 does not match")
    return Frame(kind, stream, sequence, payload, crc)


def decode_all(joined: bytes | memoryview, most: int = MAX_PAYLOAD_BYTES) -> list[Frame]:
    """Return the frames that a driver has let travel together; payloads are views.

    Raises
    ------
    ProtocolError
        If the bytes are anything but one or more sound frames.
    """
    view = memoryview(joined)
    found: list[Frame] = []
    while len(view) or not found:
        head, rest = view[:HEADER_BYTES], view[HEADER_BYTES:]
        length = payload_bytes(head, most)
        if len(rest) < length:
            raise ProtocolError(f"frame declares {length} bytes and carries {len(rest)}")
        found.append(assemble(head, rest[:length]))
        view = rest[length:]
    return found


def decode(message: bytes | memoryview, most: int = MAX_PAYLOAD_BYTES) -> Frame:
    """Return the one frame that `message` holds; see `decode_all`."""
    found = decode_all(message, most)
    if len(found) > 1:
        raise ProtocolError(f"{len(found)} frames where one was expected")
    return found[0]
