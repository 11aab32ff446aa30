from __future__ import annotations

import random
import struct
import zlib

import pytest

from fedbio.errors import ProtocolError
from fedbio.transport.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, Frame, Kind, decode, encode, split


def sealed(fields: bytes, payload: bytes = b"") -> bytes:
    return fields + struct.pack("<I", zlib.crc32(payload, zlib.crc32(fields))) + payload


def test_frame_has_the_documented_bytes() -> None:
    assert encode(Kind.CHUNK, 7, 258, b"abc").hex() == "4642494f010800000700000002010000030000009bc3816e616263"


def test_frame_comes_back_as_it_was() -> None:
    assert decode(encode(Kind.CHUNK, 2**32 - 1, 9, b"x" * MAX_PAYLOAD_BYTES)) == Frame(
        8, 2**32 - 1, 9, memoryview(b"x" * MAX_PAYLOAD_BYTES)
    )


def test_unknown_kind_is_decoded_so_that_it_can_be_skipped() -> None:
    assert decode(sealed(struct.pack("<4sBBHIII", b"FBIO", 1, 200, 0, 0, 0, 0))).kind == 200


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "frame of 0 bytes is shorter than its header of 24"),
        (b"GET / HTTP/1.1\r\nHost: somewhere", r"frame begins with b'GET ', expected b'FBIO'"),
        (
            sealed(struct.pack("<4sBBHIII", b"FBIO", 2, 1, 0, 0, 0, 0)),
            "frame of version 2, this release reads version 1; install the same release at both ends",
        ),
        (
            sealed(struct.pack("<4sBBHIII", b"FBIO", 1, 8, 0, 1, 0, 2**32 - 1)),
            "frame declares 4294967295 bytes, at most 1048576 are allowed",
        ),
        (encode(Kind.CHUNK, 1, 0, b"abc")[:-1], "frame declares 3 bytes and carries 2"),
        (encode(Kind.CHUNK, 1, 0, b"abc") + b"d", "frame declares 3 bytes and carries 4"),
        (encode(Kind.CHUNK, 1, 0, b"abc")[:-1] + b"d", "frame was damaged on the way: its CRC32 does not match"),
    ],
)
def test_malformed_frame_is_refused_with_its_own_text(message: bytes, text: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(message)
    assert str(refused.value) == text.removeprefix("r")


def test_every_flipped_bit_is_found() -> None:
    frame = encode(Kind.OPEN, 3, 0, b"some typed header")
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            decode(bytes(damaged))


def test_random_bytes_are_refused() -> None:
    dice = random.Random(1)
    for _ in range(2_000):
        with pytest.raises(ProtocolError):
            decode(b"FBIO" + dice.randbytes(dice.randrange(HEADER_BYTES * 2)))


def test_frames_that_travel_together_are_told_apart() -> None:
    frames = [encode(Kind.PING), encode(Kind.MESSAGE, 1, 0, b"abc"), encode(Kind.ACCEPTED, 4)]
    assert split(b"".join(frames)) == frames
    assert split(frames[1]) == frames[1:2]


@pytest.mark.parametrize("joined", [b"", b"x", encode(Kind.PING)[:-1], encode(Kind.PING) + b"rest"])
def test_what_is_no_sound_sequence_stays_whole_and_is_refused(joined: bytes) -> None:
    assert split(joined) == [joined]
    with pytest.raises(ProtocolError):
        decode(joined)
