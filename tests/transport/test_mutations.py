"""Damaged conversations: each is refused, or what it delivers is what was sent."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbio.errors import ProtocolError, TransportError
from fedbio.tensors import parse
from fedbio.transport import BlobPayload, Limits, wire
from fedbio.transport.drivers import Lane
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
from fedbio.transport.outgoing import Outgoing
from fedbio.transport.receiver import Receiver

from . import fuzzing
from .fuzzing import BLOB, CONVERSATIONS, FILE, MODEL, NOTE, STREAM, Judge, Verdict, small_chunks

MIB = 1 << 20


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    with small_chunks():
        yield Judge(tmp_path_factory.mktemp("conversations"))


def test_sound_conversation_of_every_kind_is_delivered(judge: Judge) -> None:
    items = fuzzing.as_value(list(fuzzing.ITEMS.items()))
    assert judge.original("notes") == [("note", b"body", None), ("note", b"", NOTE), ("eaten", b"b", NOTE)]
    assert judge.original("blob") == [("model", b"b" * 500, BLOB), ("note", b"", None)]
    assert judge.original("bytes") == [("stream", b"", STREAM), ("eaten", b"1", STREAM)]
    assert judge.original("file") == [("file", b"", FILE), ("note", b"after", None)]
    assert judge.original("object")[0] == ("items", b"", items)
    assert sorted(parse(judge.original("tensors")[0][2])) == ["bias", "weight"]
    arrived = parse(judge.original("quantized")[0][2])
    np.testing.assert_array_equal(arrived["bias"], MODEL["bias"])
    np.testing.assert_allclose(arrived["weight"], MODEL["weight"], atol=0.05)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_that_is_said_again_delivers_the_same(judge: Judge, name: str) -> None:
    for beginning in fuzzing.BEGINNINGS:
        frames = judge.frames(name, beginning)
        assert judge.say(name, frames, patience_s=5.0, beginning=beginning) == "delivered"


@pytest.mark.parametrize("seed", range(3))
def test_damaged_conversation_is_refused_or_delivers_the_original(judge: Judge, seed: int) -> None:
    verdicts = judge.run(seed, 750)
    assert verdicts.total() == 750
    assert verdicts["refused"] > 300
    assert verdicts["delivered"] > 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundred_thousand_damaged_conversations(tmp_path: Path) -> None:
    # each process waits half of its time, for answers that do not come
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, fuzzing.__file__, str(1_000 * number), "25000", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate(folders)
    ]
    verdicts = Verdict()
    for process in processes:
        out, errors = process.communicate(timeout=800)
        assert process.returncode == 0, errors[-3_000:]
        counts = json.loads(out)
        assert counts.pop("grown_bytes") < 8 * MIB
        verdicts.update(counts)
    assert verdicts.total() == 100_000
    assert verdicts["refused"] + verdicts["rejected"] > 60_000


def test_damaged_conversation_takes_less_memory_than_two_chunks(judge: Judge) -> None:
    dice = random.Random(7)
    for name in CONVERSATIONS:
        for _ in range(30):
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            judge.sending(name, random.Random(dice.getrandbits(64)))
            grown = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()
            assert grown < 2 * MIB


def test_declared_sizes_take_no_memory_by_themselves(tmp_path: Path) -> None:
    limits = Limits(memory_bytes=64 << 20, max_payload_bytes=1 << 40, max_messages=8)
    replies: list[Frame] = []

    def reply(frame: Frame, lane: Lane) -> None:
        replies.append(frame)

    receiver = Receiver("site-1", limits, tmp_path, {}, reply, print)
    tracemalloc.start()
    for stream in range(1, 200):
        receiver.take(make(Kind.OPEN, stream, 0, wire.pack(wire.Open("x", b"", "blob", (1 << 40) + 1))))
    for stream in range(200, 220):
        receiver.take(make(Kind.OPEN, stream, 0, wire.pack(wire.Open("x", b"", "object", None))))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    rejected = [frame.stream for frame in replies if frame.kind == Kind.REJECTED]
    assert rejected == [*range(1, 200), *range(208, 220)]
    receiver.close()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (lambda sent: sent.grant(2**32 - 1), "grants chunks below 4294967295, when 0 have left"),
        (lambda sent: sent.position(3, 7, None), "goes on at chunk 3, which is not one of those under way"),
        (lambda sent: sent.position(0, 2**63, None), "goes on at chunk 0 and grants chunks below"),
        (lambda sent: sent.position(2, 6, bytes(32)), "claims to have the beginning of what cannot be read twice"),
    ],
    ids=["grant", "position", "limit", "prefix"],
)
def test_receiver_that_asks_for_what_it_must_not_is_refused(what: object, text: str) -> None:
    class Nowhere(fuzzing.Scripted):
        def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None: ...

    sent = Outgoing(make(Kind.OPEN, 1))
    sent.attach(Nowhere([]), 8)
    with pytest.raises(ProtocolError, match=text):
        what(sent)  # type: ignore[operator]
    sent.finish(TransportError("over"))


def test_opening_that_was_lost_is_answered_when_it_comes_again(judge: Judge) -> None:
    # the next connection begins with it, and nothing else breaks
    for name in ("blob", "bytes", "object"):
        lost = fuzzing.linked(lambda message: [], lambda message: [message])
        assert judge.over_links(name, [lost]) == 2


frames = st.builds(
    make, st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=300)
)


@given(st.lists(frames, min_size=1, max_size=5))
def test_frames_come_back_as_they_were(sent: list[Frame]) -> None:
    joined = encode(sent)
    assert decode_all(joined) == sent
    assert len(joined) == sum(frame.size for frame in sent)
    for frame in sent:
        head = header(frame)
        assert payload_bytes(head) == len(frame.payload)
        assert assemble(head, frame.payload) == frame


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_frame(content: bytes) -> None:
    for message in (content, b"FBIO\x01" + content):
        with pytest.raises(ProtocolError):
            decode(message)


@given(frames, st.data())
def test_frame_with_any_byte_changed_is_refused(frame: Frame, data: st.DataObject) -> None:
    damaged = bytearray(encode([frame]))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        decode(bytes(damaged))


@given(st.integers(0, 2**32 - 1), st.binary(max_size=64))
def test_declared_length_is_checked_before_its_bytes_are_awaited(length: int, rest: bytes) -> None:
    fields = struct.pack("<4sBBHIIII", b"FBIO", 1, 8, 0, 1, 0, length, zlib.crc32(rest))
    head = fields + struct.pack("<I", zlib.crc32(fields))
    if length > MAX_PAYLOAD_BYTES:
        with pytest.raises(ProtocolError, match=f"frame declares {length} bytes, at most 1048576 are allowed"):
            payload_bytes(head)
    else:
        assert payload_bytes(head) == length
    if length != len(rest):
        with pytest.raises(ProtocolError):
            decode(head + rest)


digests = st.binary(min_size=32, max_size=32)
sizes = st.integers(0, 2**63 - 1)
topics = st.text(min_size=1, max_size=200)
kinds = st.sampled_from(["none", "bytes", "blob", "file", "object", "tensors", "quantized"])
structs = st.one_of(
    st.builds(wire.Message, topics, st.binary(), kinds, st.binary(), digests),
    st.builds(wire.Open, topics, st.binary(), kinds, sizes | st.none(), digests | st.none()),
    st.builds(wire.Position, sizes, digests | st.none()),
    st.builds(wire.End, sizes, digests),
    st.builds(wire.Refusal, st.text(max_size=1_000), st.booleans()),
)


@given(structs)
def test_typed_content_comes_back_as_it_was(content: wire.Struct) -> None:  # type: ignore[valid-type]
    assert wire.unpack(wire.pack(content), type(content)) == content


@given(structs, st.data())
def test_damaged_typed_content_is_refused_by_name_or_within_its_bounds(
    content: wire.Struct,  # type: ignore[valid-type]
    data: st.DataObject,
) -> None:
    damaged = bytearray(wire.pack(content))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        wire.pack(wire.unpack(memoryview(damaged), type(content)))


@settings(max_examples=30)
@given(st.integers(1, 500_000), st.sampled_from([b"\x91", b"\x81\xa1x"]))
def test_content_nested_too_deep_is_refused(depth: int, nest: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed end"):
        wire.unpack(b"\x81\xa1z" + nest * depth, wire.End)


@pytest.mark.parametrize("kind", [wire.Hello, wire.Welcome, wire.Message, wire.Open, wire.Position, wire.End])
@given(content=st.binary(max_size=100))
def test_arbitrary_bytes_are_no_typed_content(kind: type, content: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"malformed {kind.__name__.lower()}: "):
        wire.unpack(content, kind)


def test_seal_differs_with_every_part_of_a_message() -> None:
    digest = BlobPayload(b"x").digest()
    seals = {
        wire.seal(topic, body, kind, payload)
        for topic in ("a", "b")
        for body in (b"", b"a")
        for kind in ("blob", "file")
        for payload in (digest, bytes(32))
    }
    assert len(seals) == 16
    assert HEADER_BYTES == 28
