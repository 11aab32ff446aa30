"""Thousands of damaged conversations: each is refused, or what it delivers is what was sent."""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import pytest

from fedbio.errors import ProtocolError
from fedbio.transport import BytesPayload, Limits, Received, wire
from fedbio.transport.drivers import Connection, ConnectionClosed, Lane
from fedbio.transport.frames import HEADER_BYTES, Kind, decode, encode
from fedbio.transport.incoming import Receiver
from fedbio.transport.streams import Streams

LIMITS = Limits(memory_bytes=1 << 20, max_payload_bytes=1 << 20, idle_s=0.5)
SMALL = b"a small payload"
LARGE = random.Random(0).randbytes(3_000)


class Script(Connection):
    """A connection whose other end says what was written beforehand."""

    def __init__(self, frames: list[bytes], patience_s: float) -> None:
        super().__init__("site-1", "nowhere")
        self._frames = iter(frames)
        self._patience_s = patience_s
        self._answers = 0
        self._answered = threading.Event()

    def _receive(self) -> bytes:
        try:
            return next(self._frames)
        except StopIteration:
            # give a stream that is whole the time to be handed over; one that is not stays unfinished anyway
            self._answered.wait(self._patience_s)
            raise ConnectionClosed("closed by the peer") from None

    def write(self, frame: bytes, lane: Lane = Lane.URGENT) -> None:
        if frame[5] in (Kind.ACCEPTED, Kind.REJECTED):
            self._answers += 1
            if self._answers == 3:
                self._answered.set()

    def close(self) -> None: ...

    def abort(self) -> None: ...


def conversation() -> list[bytes]:
    """Return the frames of three messages: one in a frame, one in chunks, one with a body in chunks; and some noise."""
    small, large = BytesPayload(SMALL), BytesPayload(LARGE)
    whole = wire.Message("small", b"body", SMALL, wire.seal("small", b"body", small.digest()))
    frames = [encode(Kind.PING), encode(Kind.MESSAGE, 1, 0, wire.pack(whole))]
    frames.append(encode(Kind.OPEN, 2, 0, wire.pack(wire.Open("large", 500, len(LARGE)))))
    parts = [b"b" * 500, LARGE[:1_000], LARGE[1_000:2_500], LARGE[2_500:]]
    frames += [encode(Kind.CHUNK, 2, number, part) for number, part in enumerate(parts)]
    frames.append(encode(Kind.END, 2, 4, wire.seal("large", b"b" * 500, large.digest())))
    whole = wire.Message("bare", b"", None, wire.seal("bare", b"", None))
    return [*frames, encode(Kind.MESSAGE, 3, 0, wire.pack(whole)), encode(Kind.PONG)]


def resealed(frame: bytes) -> bytes:
    """Make the CRC fit again, as someone who attacks would."""
    crc = zlib.crc32(frame[HEADER_BYTES:], zlib.crc32(frame[:20]))
    return frame[:20] + struct.pack("<I", crc) + frame[HEADER_BYTES:]


def mutate(frames: list[bytes], dice: random.Random) -> list[bytes]:
    frames = list(frames)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        at = dice.randrange(len(frames))
        frame = bytearray(frames[at])
        kind = dice.randrange(9) if len(frame) >= HEADER_BYTES else 5
        if kind == 0:
            frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del frame[dice.randrange(len(frame)) :]
        elif kind == 2:
            frame += dice.randbytes(dice.randrange(1, 40))
        elif kind == 3:
            begin = dice.randrange(len(frame))
            frame[begin : begin + 4] = dice.choice([bytes(4), b"\xff" * 4, dice.randbytes(4)])
        elif kind == 4:
            frames.insert(dice.randrange(len(frames)), bytes(frame))
        elif kind == 5:
            del frames[at]
            if not frames:
                return frames
            continue
        elif kind == 6:
            other = dice.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
            continue
        elif kind == 7:
            struct.pack_into("<I", frame, dice.choice([8, 12]), dice.choice([0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1]))
        else:
            frame[5] = dice.randrange(16)
        length = len(frame) - HEADER_BYTES
        if dice.random() < 0.7 and length >= 0:
            if dice.random() < 0.9:
                struct.pack_into("<I", frame, 16, length)
            frame = bytearray(resealed(bytes(frame)))
        frames[min(at, len(frames) - 1)] = bytes(frame)
    return frames


def deliver(
    frames: list[bytes], spool: Path, patience_s: float = 0.005
) -> tuple[list[tuple[str, bytes, bytes | None]], str]:
    """Return what a receiver hands over of a conversation, and why the connection ended."""
    got: list[tuple[str, bytes, bytes | None]] = []

    def take(message: Received) -> None:
        got.append((message.topic, message.body, message.payload and bytes(message.payload.content)))

    streams = Streams(
        Script(frames, patience_s), peer="site-1", peer_window=8, limits=LIMITS, spool=spool, deliver=take
    )
    streams.announced.set()
    reason = streams.run()
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("site-1-")]
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive(), "a worker hangs"
    return got, reason


ORIGINAL = {("small", b"body", SMALL), ("large", b"b" * 500, LARGE), ("bare", b"", None)}


def test_sound_conversation_is_delivered(tmp_path: Path) -> None:
    got, reason = deliver(conversation(), tmp_path, patience_s=5.0)
    assert set(got) == ORIGINAL
    assert reason == "closed by the peer"


@pytest.mark.parametrize("seed", range(4))
def test_damaged_conversation_is_refused_or_delivers_the_original(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    frames = conversation()
    refused = 0
    for _ in range(1_000):
        got, reason = deliver(mutate(frames, dice), tmp_path)
        assert len(got) == len(set(got))
        assert set(got) <= ORIGINAL
        assert reason.startswith(("closed by the peer", "protocol error: ")), reason
        refused += reason != "closed by the peer"
    assert refused > 400


def test_damaged_typed_content_is_refused_by_name(tmp_path: Path) -> None:
    dice = random.Random(5)
    content = wire.pack(wire.Hello((1,), "0.1.0", bytes(16), 4711, 8))
    for _ in range(3_000):
        damaged = bytearray(content)
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        with contextlib.suppress(ProtocolError):
            hello = wire.unpack(memoryview(bytes(damaged)), wire.Hello)
            assert len(hello.instance) == 16


def test_declared_sizes_take_no_memory_by_themselves(tmp_path: Path) -> None:
    limits = Limits(memory_bytes=64 << 20, max_payload_bytes=1 << 40)
    replies: list[tuple[Kind, int]] = []
    receiver = Receiver(
        "site-1", limits, tmp_path, lambda kind, stream, *rest, **more: replies.append((kind, stream)), print
    )
    tracemalloc.start()
    for stream in range(1, 200):
        receiver.take(decode(encode(Kind.OPEN, stream, 0, wire.pack(wire.Open("x", 1 << 60, 1 << 39)))))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert replies == [(Kind.REJECTED, stream) for stream in range(1, 200)]
    receiver.close()
