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
20      4      CRC32             of bytes 0 to 19 and the payload
24      n      payload           raw bytes in a chunk, MessagePack elsewhere
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
    "decode",
    "encode",
    "split",
]

import enum
import struct
import zlib
from typing import NamedTuple

from fedbio.errors import ProtocolError

MAGIC = b"FBIO"
VERSION = 1
_FIELDS = struct.Struct("<4sBBHIII")
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
    """The beginning of a stream: topic and sizes."""
    CHUNK = 8
    """The next bytes of a stream."""
    END = 9
    """The end of a stream: the digest of the whole."""
    CANCEL = 10
    """The sender gives a stream up."""
    CREDIT = 11
    """The receiver has taken chunks in and grants so many more."""
    ACCEPTED = 12
    """The receiver has the whole message and its digest is right."""
    REJECTED = 13
    """The receiver does not take a message, with the reason."""


class Frame(NamedTuple):
    """A decoded frame; the payload is a view of the bytes that arrived."""

    kind: int
    stream: int
    sequence: int
    payload: memoryview


def encode(kind: Kind, stream: int = 0, sequence: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """Return a frame's bytes; the payload is copied once, behind its header."""
    fields = _FIELDS.pack(MAGIC, VERSION, kind, 0, stream, sequence, len(payload))
    crc = zlib.crc32(payload, zlib.crc32(fields))
    return b"".join((fields, _CRC.pack(crc), payload))


def split(joined: bytes) -> list[bytes]:
    """Return the frames that a driver has let travel together; what is no sound sequence stays whole for `decode`."""
    found = []
    begin = 0
    while begin < len(joined):
        if len(joined) - begin < HEADER_BYTES:
            return [joined]
        length: int = _FIELDS.unpack_from(joined, begin)[-1]
        end = begin + HEADER_BYTES + length
        if end > len(joined):
            return [joined]
        if end - begin == len(joined):
            return [joined]  # the common case, without a copy
        found.append(joined[begin:end])
        begin = end
    return found or [joined]


def decode(message: bytes) -> Frame:
    """Return the frame that `message` holds, after checking every field.

    Raises
    ------
    ProtocolError
        If the bytes are not exactly one sound frame of this version.
    """
    if len(message) < HEADER_BYTES:
        raise ProtocolError(f"frame of {len(message)} bytes is shorter than its header of {HEADER_BYTES}")
    magic, version, kind, _, stream, sequence, length = _FIELDS.unpack_from(message)
    if magic != MAGIC:
        raise ProtocolError(f"frame begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(
            f"frame of version {version}, this release reads version {VERSION}; install the same release at both ends"
        )
    if length > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"frame declares {length} bytes, at most {MAX_PAYLOAD_BYTES} are allowed")
    payload = memoryview(message)[HEADER_BYTES:]
    if len(payload) != length:
        raise ProtocolError(f"frame declares {length} bytes and carries {len(payload)}")
    (crc,) = _CRC.unpack_from(message, _FIELDS.size)
    if zlib.crc32(payload, zlib.crc32(message[: _FIELDS.size])) != crc:
        raise ProtocolError("frame was damaged on the way: its CRC32 does not match")
    return Frame(kind, stream, sequence, payload)
