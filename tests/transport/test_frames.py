from __future__ import annotations

import random
import struct
import zlib

import pytest

from fedbio.errors import ProtocolError
from fedbio.transport.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Frame,
    Kind,
    assemble,
    decode,
    decode_all,
    encode,
    header,
    make,
    payload_bytes,
)


def sealed(fields: bytes) -> bytes:
    return fields + struct.pack("<I", zlib.crc32(fields))


def test_frame_has_the_documented_bytes() -> None:
    frame = make(Kind.CHUNK, 7, 258, b"abc")
    assert encode([frame]).hex() == "4642494f01080000070000000201000003000000c2412435" + "3177ef39" + "616263"
    assert encode([frame]) == header(frame) + b"abc"
    assert frame.crc == zlib.crc32(b"abc")
    assert frame.size == HEADER_BYTES + 3 == 31


def test_frame_comes_back_as_it_was() -> None:
    frame = make(Kind.CHUNK, 2**32 - 1, 9, b"x" * MAX_PAYLOAD_BYTES)
    assert decode(encode([frame])) == frame == Frame(8, 2**32 - 1, 9, b"x" * MAX_PAYLOAD_BYTES, frame.crc)


def test_payload_is_a_view_of_what_arrived() -> None:
    arrived = bytearray(encode([make(Kind.CHUNK, 1, 0, b"abc")]))
    payload = decode(arrived).payload
    arrived[-1:] = b"d"
    assert payload == b"abd"


def test_header_and_payload_may_be_read_apart() -> None:
    frame = make(Kind.MESSAGE, 3, 0, b"abc")
    assert payload_bytes(header(frame)) == 3
    assert assemble(header(frame), b"abc") == frame


def test_length_is_refused_before_the_payload_is_read() -> None:
    with pytest.raises(ProtocolError, match="frame declares 65537 bytes, at most 65536 are allowed"):
        payload_bytes(header(make(Kind.CHUNK, 1, 0, bytes(65_537))), 65_536)


def test_unknown_kind_is_decoded_so_that_it_can_be_skipped() -> None:
    assert decode(sealed(struct.pack("<4sBBHIIII", b"FBIO", 1, 200, 0, 0, 0, 0, 0))).kind == 200


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "frame of 0 bytes is shorter than its header of 28"),
        (b"GET / HTTP/1.1\r\nHost: somewhere", "frame begins with b'GET ', expected b'FBIO'"),
        (
            sealed(struct.pack("<4sBBHIIII", b"FBIO", 2, 1, 0, 0, 0, 0, 0)),
            "frame of version 2, this release reads version 1; install the same release at both ends",
        ),
        (
            sealed(struct.pack("<4sBBHIIII", b"FBIO", 1, 8, 0, 1, 0, 2**32 - 1, 0)),
            "frame declares 4294967295 bytes, at most 1048576 are allowed",
        ),
        (
            struct.pack("<4sBBHIIIII", b"FBIO", 1, 8, 0, 1, 0, 0, 0, 1),
            "frame was damaged on the way: its header's CRC32 does not match",
        ),
        (encode([make(Kind.CHUNK, 1, 0, b"abc")])[:-1], "frame declares 3 bytes and carries 2"),
        (encode([make(Kind.CHUNK, 1, 0, b"abc")]) + b"d", "frame of 1 bytes is shorter than its header of 28"),
        (
            encode([make(Kind.CHUNK, 1, 0, b"abc")])[:-1] + b"d",
            "frame was damaged on the way: its payload's CRC32 does not match",
        ),
        (encode([make(Kind.PING), make(Kind.PONG)]), "2 frames where one was expected"),
    ],
)
def test_malformed_frame_is_refused_with_its_own_text(message: bytes, text: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(message)
    assert str(refused.value) == text


def test_every_flipped_bit_is_found() -> None:
    frame = encode([make(Kind.OPEN, 3, 0, b"some typed header")])
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            decode(bytes(damaged))


def test_random_bytes_are_refused() -> None:
    dice = random.Random(1)
    for _ in range(2_000):
        with pytest.raises(ProtocolError):
            decode_all(b"FBIO" + dice.randbytes(dice.randrange(HEADER_BYTES * 2)))


def test_frames_that_travel_together_are_told_apart() -> None:
    frames = [make(Kind.PING), make(Kind.MESSAGE, 1, 0, b"abc"), make(Kind.ACCEPTED, 4)]
    assert decode_all(encode(frames)) == frames
    assert decode_all(encode(frames[1:2])) == frames[1:2]


@pytest.mark.parametrize("joined", [b"", b"x", encode([make(Kind.PING)])[:-1], encode([make(Kind.PING)]) + b"rest"])
def test_what_is_no_sound_sequence_is_refused_whole(joined: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_all(joined)
