"""Links that cut, stall, crawl and tamper: every message comes once, whole, and little is sent twice."""

from __future__ import annotations

import logging
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import PeerUnreachable, TransportError
from fedbio.transport import (
    BlobPayload,
    BytesPayload,
    ConsumerSink,
    Credentials,
    FilePayload,
    Limits,
    ObjectPayload,
    Payload,
    Presence,
    Received,
    ServerEndpoint,
    SiteEndpoint,
    Unencrypted,
)
from fedbio.transport.frames import Kind, decode, encode
from fedbio.transport.sharing import KEPT_CHUNKS

from .conftest import Inbox, eventually
from .proxy import DOWN, UP, Proxy, Tamper

MIB = 1 << 20
WINDOW = 8
OVER_TCP = pytest.param("tcp", marks=pytest.mark.slow)
CONTENT = np.random.default_rng(5).bytes(24 * MIB + 4_321)
BREAK_BYTES = WINDOW * (MIB + 28) + (64 << 10)
"""What may be sent twice after a break: a window of chunks, and handshakes and openings."""


class Link:
    """A server and a site with a proxy between them."""

    def __init__(self, kits: Path, folder: Path) -> None:
        self._kits, self._folder = kits, folder
        self.at_server, self.at_site = Inbox(), Inbox()
        self.here, self.there = Inbox(), Inbox()
        self.server: ServerEndpoint
        self.site: SiteEndpoint
        self.proxy: Proxy

    def open(
        self,
        driver: str = "tcp",
        *,
        tamper: Tamper | None = None,
        heartbeat_s: float = 1.0,
        server_heartbeat_s: float | None = None,
        sinks: Any = None,
        connect_deadline_s: float = 30.0,
        **limits: Any,
    ) -> None:
        kept = Limits(**{"window_chunks": WINDOW, **limits})
        plain = driver == "tcp"
        options: dict[str, Any] = {"limits": kept, "driver": driver}
        self.server = ServerEndpoint(
            "127.0.0.1:0",
            Unencrypted("server") if plain else Credentials.from_kit(self._kits / "server"),
            spool=self._folder / "server",
            on_message=self.at_server,
            on_peer=self.here,
            sinks=sinks,
            heartbeat_s=server_heartbeat_s or heartbeat_s,
            **options,
        ).start()
        self.proxy = Proxy(self.server.address, tamper)
        self.site = SiteEndpoint(
            self.proxy.address,
            Unencrypted("site-1") if plain else Credentials.from_kit(self._kits / "site-1"),
            spool=self._folder / "site",
            on_message=self.at_site,
            on_connection=self.there,
            connect_deadline_s=connect_deadline_s,
            heartbeat_s=heartbeat_s,
            **options,
        ).start()
        eventually(self.server.peers)

    def sender(self, direction: str) -> tuple[Callable[..., Any], Inbox]:
        """Return what sends in a direction, and where it arrives."""
        if direction == UP:
            return self.site.send, self.at_server
        return lambda *args, **more: self.server.send("site-1", *args, **more), self.at_site

    def close(self) -> None:
        self.site.close()
        self.server.close()
        self.proxy.close()


@pytest.fixture
def link(kits: Path, tmp_path: Path) -> Iterator[Link]:
    made = Link(kits, tmp_path)
    yield made
    made.close()


def payload_of(kind: str, folder: Path) -> Payload:
    if kind == "file":
        (folder / "source").write_bytes(CONTENT)
        return FilePayload(folder / "source")
    if kind == "bytes":
        return BytesPayload(CONTENT[begin : begin + 700_001] for begin in range(0, len(CONTENT), 700_001))
    return BlobPayload(CONTENT)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def topics(inbox: Inbox) -> list[str]:
    return [message.topic for message in inbox.items if isinstance(message, Received)]


def whole(inbox: Inbox, topic: str = "model") -> bytes:
    eventually(lambda: topic in topics(inbox))
    [message] = [message for message in inbox.items if isinstance(message, Received) and message.topic == topic]
    return bytes(message.payload.content)


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize(("driver", "kind"), [("tcp", "blob"), ("tcp", "bytes"), ("tcp", "file"), ("grpc", "blob")])
def test_connection_that_is_cut_again_and_again_loses_nothing(
    link: Link, tmp_path: Path, driver: str, kind: str, direction: str
) -> None:
    dice = random.Random(f"{driver}{kind}{direction}")
    link.open(driver)
    send, inbox = link.sender(direction)
    cuts = 8
    link.proxy.cut_at([dice.randrange(len(CONTENT)) for _ in range(cuts)])
    notes = [f"note {number}" for number in range(40)]
    sending = in_background(lambda: [send(note) for note in notes])
    assert send("model", b"body", payload_of(kind, tmp_path)).bytes == len(CONTENT) + 4
    sending.join(20)
    assert link.proxy.cuts_left == 0
    assert whole(inbox) == CONTENT
    eventually(lambda: len(inbox.items) == 41)
    assert sorted(topics(inbox)) == sorted([*notes, "model"])
    assert link.proxy.passed[direction] < len(CONTENT) * 1.002 + cuts * BREAK_BYTES
    assert set(link.there.items) <= {Presence.ARRIVED, Presence.LOST, Presence.BACK}


def test_cuts_in_both_directions_at_once_mix_nothing_up(link: Link) -> None:
    link.open("tcp")
    dice = random.Random(3)
    link.proxy.cut_at([dice.randrange(2 * len(CONTENT)) for _ in range(10)])
    other = CONTENT[::-1]
    sending = in_background(lambda: link.server.send("site-1", "model", b"", BlobPayload(other)))
    link.site.send("model", b"", BlobPayload(CONTENT))
    sending.join(20)
    assert whole(link.at_server) == CONTENT
    assert whole(link.at_site) == other


@pytest.mark.parametrize("driver", ["grpc", OVER_TCP])
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_stalled_link_is_found_by_missing_heartbeats_and_left(link: Link, driver: str, direction: str) -> None:
    link.open(driver, heartbeat_s=0.15)
    send, inbox = link.sender(direction)
    link.proxy.bytes_per_s = 40e6
    started = time.monotonic()
    for number in range(2):
        threading.Timer(0.1 + 0.9 * number, link.proxy.stall).start()
    send("model", b"", BlobPayload(CONTENT))
    assert whole(inbox) == CONTENT
    eventually(lambda: link.proxy.connections >= 3, 5.0)
    assert time.monotonic() - started < 8.0
    assert link.proxy.passed[direction] < len(CONTENT) * 1.002 + 2 * BREAK_BYTES


def half_open_is_found_within(link: Link, seconds: float) -> None:
    link.proxy.stall()
    started = time.monotonic()
    eventually(lambda: Presence.LOST in link.there.items, seconds)
    eventually(lambda: ("site-1", Presence.BACK) in link.here.items, seconds)
    assert time.monotonic() - started < seconds
    link.site.send("still here")
    link.server.send("site-1", "here too")


def test_half_open_connection_is_found_by_both_ends(link: Link) -> None:
    link.open(heartbeat_s=0.25)
    half_open_is_found_within(link, 1.5)


@pytest.mark.parametrize("driver", ["grpc", OVER_TCP])
def test_site_that_dials_anew_before_its_break_is_noticed_was_lost_first_and_is_back_last(
    link: Link, driver: str
) -> None:
    link.open(driver, heartbeat_s=0.05, server_heartbeat_s=60.0)
    for breaks in range(1, 6):
        link.proxy.stall()
        eventually(lambda breaks=breaks: len(link.here.items) >= 1 + 2 * breaks)  # type: ignore[misc]
    link.site.send("still here")
    told = [item[1] for item in link.here.items if isinstance(item, tuple)]
    assert told == [Presence.ARRIVED, *[Presence.LOST, Presence.BACK] * 5]


@pytest.mark.slow
@pytest.mark.faults
def test_half_open_connection_is_found_in_thirty_seconds_with_default_settings(link: Link) -> None:
    link.open(heartbeat_s=5.0)
    half_open_is_found_within(link, 30.0)


def server_goes_away_for(link: Link, seconds: float, driver: str) -> None:
    link.open(driver, connect_deadline_s=120.0)
    link.proxy.bytes_per_s = 30e6
    threading.Timer(0.2, link.proxy.go_away).start()
    back = threading.Timer(0.2 + seconds, link.proxy.come_back)
    back.start()
    started = time.monotonic()
    sending = in_background(lambda: link.server.send("site-1", "model", b"", BlobPayload(CONTENT[::-1])))
    link.site.send("model", b"", BlobPayload(CONTENT))
    sending.join(20)
    assert seconds < time.monotonic() - started < seconds + 8
    assert (whole(link.at_server), whole(link.at_site)) == (CONTENT, CONTENT[::-1])
    assert link.there.items == [Presence.ARRIVED, Presence.LOST, Presence.BACK]
    assert max(link.proxy.passed.values()) < len(CONTENT) * 1.002 + BREAK_BYTES


@pytest.mark.parametrize("driver", ["grpc", OVER_TCP])
def test_server_address_that_is_gone_for_a_while_interrupts_only(link: Link, driver: str) -> None:
    server_goes_away_for(link, 1.0, driver)


@pytest.mark.slow
@pytest.mark.faults
def test_server_address_that_is_gone_for_a_minute_interrupts_only(link: Link) -> None:
    server_goes_away_for(link, 60.0, "grpc")


def test_flipped_bits_are_found_and_the_chunks_sent_again(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dice = random.Random(1)
    due = {2, 13, 24}  # more than a window apart: each on a connection of its own

    def flip(direction: str, frame: bytes) -> list[bytes]:
        damaged = bytearray(frame)
        sequence = int.from_bytes(frame[12:16], "little")
        if frame[5] == Kind.CHUNK and sequence in due:
            due.remove(sequence)
            damaged[dice.randrange(28, len(frame))] ^= 1 << dice.randrange(8)
        return [bytes(damaged)]

    link.open(tamper=flip)
    link.site.send("model", b"", BlobPayload(CONTENT))
    assert whole(link.at_server) == CONTENT
    assert caplog.text.count("frame was damaged on the way: its payload's CRC32 does not match") == 3
    assert link.proxy.passed[UP] < len(CONTENT) * 1.002 + 3 * BREAK_BYTES


def test_chunk_that_was_forged_with_its_crc_is_found_by_the_digest(link: Link) -> None:
    def forge(direction: str, frame: bytes) -> list[bytes]:
        found = decode(frame)
        if found.kind == Kind.CHUNK and found.sequence == 5:
            content = bytes(found.payload[:-1]) + b"?"
            return [encode([found._replace(payload=content, crc=decode_crc(content))])]
        return [frame]

    link.open(tamper=forge)
    with pytest.raises(TransportError, match="not accepted: the whole does not match its digest; send it again"):
        link.site.send("model", b"", BlobPayload(CONTENT))
    link.site.send("note")
    eventually(lambda: link.at_server.items)
    assert topics(link.at_server) == ["note"]


def decode_crc(content: bytes) -> int:
    from isal.isal_zlib import crc32

    return crc32(content)


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("fault", ["swap", "duplicate", "drop chunks"])
def test_whole_frames_out_of_order_twice_or_lost_change_nothing(link: Link, fault: str, direction: str) -> None:
    dice = random.Random(fault)
    held: dict[str, bytes] = {}

    def shuffle(way: str, frame: bytes) -> list[bytes]:
        if way in held:
            return [frame, held.pop(way)]
        if frame[5] < Kind.PING or dice.random() > 0.15:
            return [frame]
        if fault == "duplicate":
            return [frame, frame]
        if fault == "drop chunks":
            return [] if frame[5] == Kind.CHUNK else [frame]
        held[way] = frame  # until the next one; pings see to it that there is one
        return []

    # a stream of which nothing moves any more is looked after by its next connection
    link.open(tamper=shuffle, heartbeat_s=0.1)
    send, inbox = link.sender(direction)
    sending = in_background(lambda: [send(f"note {number}") for number in range(20)])
    send("model", b"", BlobPayload(CONTENT[: 12 * MIB]))
    sending.join(20)
    assert whole(inbox) == CONTENT[: 12 * MIB]
    eventually(lambda: len(inbox.items) == 21)
    assert sorted(topics(inbox)) == sorted(["model", *(f"note {number}" for number in range(20))])


def test_end_that_is_lost_is_missed_within_the_idle_time(link: Link) -> None:
    link.open(tamper=lambda direction, frame: [] if frame[5] == Kind.END else [frame], heartbeat_s=0.2, idle_s=0.6)
    with pytest.raises(TransportError, match=r"not accepted: nothing arrived for 0\.6 s"):
        link.site.send("model", b"", BlobPayload(CONTENT[:MIB]))


@pytest.mark.parametrize("driver", ["grpc", OVER_TCP])
def test_slow_link_never_fails_a_transfer_that_moves(link: Link, driver: str) -> None:
    link.open(driver, heartbeat_s=0.4, idle_s=1.0, resume_s=1.0)
    link.proxy.bytes_per_s = 2.5e6  # a chunk in less than half a second
    started = time.monotonic()
    link.site.send("model", b"", BlobPayload(CONTENT[: 5 * MIB]))
    assert time.monotonic() - started > 1.5
    assert whole(link.at_server) == CONTENT[: 5 * MIB]
    assert link.proxy.connections == 1


@pytest.mark.parametrize("stalls", [False, True], ids=["moves", "stalls"])
def test_deadline_ends_a_transfer_whether_it_moves_or_not(link: Link, stalls: bool) -> None:
    link.open(heartbeat_s=0.3)
    link.proxy.bytes_per_s = 5e6
    if stalls:
        link.proxy.stall()
    started = time.monotonic()
    with pytest.raises(PeerUnreachable, match="no acknowledgement within the time given"):
        link.site.send("model", b"", BlobPayload(CONTENT), timeout_s=0.8)
    assert 0.8 <= time.monotonic() - started < 2.2
    link.proxy.bytes_per_s = None
    link.site.send("note")
    eventually(lambda: link.at_server.items)
    assert topics(link.at_server) == ["note"]
    # the receiver has let go of it
    eventually(lambda: not link.server._peers["site-1"].session._receiver._streams)


def test_consumer_that_blocks_stops_the_producer(link: Link) -> None:
    gate = threading.Event()
    eaten = 0

    def eat(chunk: memoryview) -> None:
        nonlocal eaten
        gate.wait(20)
        eaten += len(chunk)

    made = 0

    def produce() -> Iterator[bytes]:
        nonlocal made
        for _ in range(60):
            made += 1
            yield bytes(MIB)

    link.open(sinks={"stream": lambda opening: ConsumerSink(eat)})
    sending = in_background(lambda: link.site.send("stream", b"", BytesPayload(produce())))
    eventually(lambda: made >= WINDOW)
    time.sleep(0.5)
    assert made <= WINDOW + KEPT_CHUNKS + 2
    link.site.send("note")  # the connection is not held up
    gate.set()
    sending.join(20)
    assert (made, eaten) == (60, 60 * MIB)


def test_object_stream_asks_for_the_next_item_while_the_last_is_under_way(link: Link) -> None:
    link.open()
    link.proxy.bytes_per_s = 20e6
    moments: list[float] = []

    def items() -> Iterator[tuple[str, Any]]:
        for number in range(4):
            moments.append(time.monotonic())
            yield str(number), np.full(4 * MIB, number, np.uint8)

    link.site.send("items", b"", ObjectPayload(items()))
    ended = time.monotonic()
    assert ended - moments[-1] > 0.1
    [message] = link.at_server.wait(1)
    assert [(name, int(array[0])) for name, array in message.payload.items()] == [(str(n), n) for n in range(4)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("driver", ["grpc", OVER_TCP])
def test_small_message_is_quick_beside_a_model_on_a_slow_link(link: Link, driver: str) -> None:
    link.open(driver)
    link.proxy.bytes_per_s = 8e6
    content = CONTENT[: 16 * MIB]
    sending = in_background(lambda: link.site.send("model", b"", BlobPayload(content)))
    time.sleep(0.3)
    seconds = []
    while sending.is_alive() and len(seconds) < 8:
        seconds.append(link.site.send("note", timeout_s=10.0).seconds)
    sending.join(20)
    # behind the chunk that is leaving and what the kernel holds, not behind the model, which takes two seconds
    assert statistics.median(seconds) < 0.7
    assert whole(link.at_server) == content
