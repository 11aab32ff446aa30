"""Damage valid conversations of every kind, and judge what becomes of them.

Run as ``python tests/transport/fuzzing.py SEED COUNT FOLDER`` it prints how often each verdict came, as JSON.
"""

from __future__ import annotations

__all__ = ["CONVERSATIONS", "Judge", "Verdict", "small_chunks"]

import collections
import contextlib
import json
import logging
import queue
import random
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import PeerUnreachable, ProtocolError, RefusedError, TransportError
from fedbio.transport import (
    BlobPayload,
    BytesPayload,
    ConsumerSink,
    FilePayload,
    Limits,
    ObjectPayload,
    ObjectSink,
    Payload,
    Received,
    ReceivedPayload,
    Sink,
    TensorPayload,
    handshake,
    incoming,
    objects,
    payloads,
    receiver,
    session,
    sinks,
    spool,
    wire,
)
from fedbio.transport.drivers import Connection, ConnectionClosed, Lane
from fedbio.transport.frames import HEADER_BYTES, Frame, Kind, decode_all, encode, make

BEGINNINGS = ("none", "right", "wrong")
"""What a receiver may have of a file from earlier."""

CHUNK = 1 << 10
WINDOW = 4
LIMITS = Limits(memory_bytes=1 << 20, max_payload_bytes=1 << 20, window_chunks=WINDOW, handshake_s=5.0)
QUIET_S = 0.015
"""A live conversation in which nothing has happened for so long gets a new connection."""
PATIENCE_S = 10.0
"""What takes longer hangs."""

Script = tuple[str, bytes, Callable[[Path], Payload | None]]
Found = tuple[str, bytes, Any]
Verdict = collections.Counter[str]

_content = random.Random(0).randbytes
NOTE, BLOB, STREAM, FILE = _content(90), _content(3_500), _content(6_000), _content(5 * CHUNK + 17)
ITEMS = {
    "embedding": np.arange(900, dtype=np.float32).reshape(30, 30),
    "count": np.array(7),
    "none": np.zeros((0, 4), np.float16),
}
MODEL = {
    "weight": np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32),
    "bias": np.arange(3, dtype=np.float64),
}


def _file(folder: Path) -> Payload:
    path = folder / "source"
    if not path.exists():
        path.write_bytes(FILE)
    return FilePayload(path)


def _bytes(folder: Path) -> Payload:
    return BytesPayload(STREAM[begin : begin + 700] for begin in range(0, len(STREAM), 700))


CONVERSATIONS: dict[str, list[Script]] = {
    "notes": [
        ("note", b"body", lambda _: None),
        ("note", b"", lambda _: BlobPayload(NOTE)),
        ("eaten", b"b", lambda _: BlobPayload(NOTE)),
    ],
    "blob": [("model", b"b" * 500, lambda _: BlobPayload(BLOB)), ("note", b"", lambda _: None)],
    "bytes": [("stream", b"", _bytes), ("eaten", b"1", _bytes)],
    "file": [("file", b"", _file), ("note", b"after", lambda _: None)],
    "object": [("items", b"", lambda _: ObjectPayload(ITEMS)), ("objects", b"", lambda _: ObjectPayload(ITEMS))],
    "tensors": [("model", b"", lambda _: TensorPayload(MODEL))],
    "quantized": [("model", b"8", lambda _: TensorPayload(MODEL, "int8")), ("note", b"", lambda _: None)],
}


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Let chunks be of 1 KiB, and all that is larger travel in chunks, so that a conversation of many costs little."""
    modules = (incoming, objects, payloads, sinks, spool)
    before = objects.CHUNK_BYTES, session.INLINE_BYTES, objects.FLUSH_BYTES, spool.PATIENCE_S, receiver.Workers
    for module in modules:
        module.CHUNK_BYTES = CHUNK  # type: ignore[attr-defined]
    session.INLINE_BYTES, objects.FLUSH_BYTES, spool.PATIENCE_S = 256, 64, 0.01
    receiver.Workers = Pool  # type: ignore[misc, assignment]
    failures = _Failures()
    logging.getLogger("fedbio.transport").addHandler(failures)
    try:
        yield
    finally:
        logging.getLogger("fedbio.transport").removeHandler(failures)
        for module in modules:
            module.CHUNK_BYTES = before[0]  # type: ignore[attr-defined]
        session.INLINE_BYTES, objects.FLUSH_BYTES, spool.PATIENCE_S, receiver.Workers = before[1:]  # type: ignore[misc]
        Pool.close_all()


class _Failures(logging.Handler):
    """What the transport logs as a bug is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            Pool.failures.append(record.exc_info[1] if record.exc_info else record.getMessage())


class Pool:
    """The threads of all sessions, kept from one to the next; takes the place of `Workers`."""

    failures: list[object] = []
    _work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    _idle = threading.Condition()
    _pending = 0
    _threads: list[threading.Thread] = []

    def __init__(self, name: str, most: int) -> None: ...

    def submit(self, work: Callable[[], None]) -> None:
        self.start(work)

    def close(self) -> None: ...

    @classmethod
    def start(cls, work: Callable[[], None]) -> None:
        with cls._idle:
            cls._pending += 1
            if cls._pending > len(cls._threads):
                cls._threads.append(threading.Thread(target=cls._run, name="fuzzing", daemon=True))
                cls._threads[-1].start()
        cls._work.put(work)

    @classmethod
    def _run(cls) -> None:
        while (work := cls._work.get()) is not None:
            try:
                work()
            except BaseException as error:
                cls.failures.append(error)
            del work
            with cls._idle:
                cls._pending -= 1
                cls._idle.notify_all()

    @classmethod
    def wait(cls) -> None:
        """Wait until nothing runs; raise what has failed."""
        with cls._idle:
            assert cls._idle.wait_for(lambda: not cls._pending, PATIENCE_S), "a thread hangs"
        if cls.failures:
            failure = cls.failures.pop()
            raise failure if isinstance(failure, BaseException) else AssertionError(failure)

    @classmethod
    def close_all(cls) -> None:
        for _ in cls._threads:
            cls._work.put(None)
        for thread in cls._threads:
            thread.join(PATIENCE_S)
        cls._threads.clear()


class Eaten(ConsumerSink):
    """Hands over all that it was fed with."""

    def __init__(self) -> None:
        self._fed: list[bytes] = []
        super().__init__(lambda chunk: self._fed.append(bytes(chunk)))

    def finish(self) -> Any:
        return b"".join(self._fed)


class Kept(ObjectSink):
    """Hands over all items."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, np.ndarray[Any, Any]]] = []
        super().__init__(lambda name, array: self._kept.append((name, array)), 1 << 20)

    def finish(self) -> Any:
        super().finish()
        return as_value(self._kept)


SINKS: dict[str, Callable[[Any], Sink]] = {"eaten": lambda opening: Eaten(), "items": lambda opening: Kept()}


def as_value(payload: Any) -> Any:
    """Return what can be compared: a payload's bytes, or its items."""
    if isinstance(payload, ReceivedPayload):
        return bytes(payload.content)
    if isinstance(payload, list):
        return tuple((name, array.dtype.str, array.shape, array.tobytes()) for name, array in payload)
    return payload


class Scripted(Connection):
    """A connection whose other end says what was written beforehand, each chunk when it was granted.

    Parameters
    ----------
    messages : sequence of bytes
    unasked : int
        Chunks of a stream that may be sent before anything is granted.
    patience_s : float
        Seconds to wait for what is not granted.
    """

    def __init__(self, messages: Sequence[bytes], unasked: int = WINDOW, patience_s: float = 0.02) -> None:
        super().__init__("site-1", "nowhere")
        self._messages = iter(messages)
        self._unasked = unasked
        self._patience_s = patience_s
        self._granted: dict[int, int] = {}
        self._changed = threading.Condition()
        self.streams: Callable[[], list[Any]] = list
        self.answers: Verdict = collections.Counter()

    def _receive(self) -> Sequence[Frame]:
        message = next(self._messages, None)
        if message is None:
            self._let_finish()
            raise ConnectionClosed("closed by the peer")
        if len(message) >= HEADER_BYTES and message[5] in (Kind.CHUNK, Kind.RESTART):
            stream, sequence = struct.unpack_from("<II", message, 8)
            self._wait_for(stream, sequence)
            if message[5] == Kind.RESTART:
                self._granted[stream] = WINDOW
        return decode_all(message, self.allowed_bytes)

    def _wait_for(self, stream: int, sequence: int) -> None:
        if sequence <= 1_000:  # else it is damaged, and nobody will grant it
            with self._changed:
                self._changed.wait_for(lambda: sequence < self._granted.get(stream, self._unasked), self._patience_s)

    def _let_finish(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while any(stream._ended for stream in self.streams()):
            assert time.monotonic() < deadline, "a stream that has ended hangs"
            time.sleep(0.0001)

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        self.answers[Kind(frame.kind).name] += 1
        if frame.kind in (Kind.POSITION, Kind.CREDIT):
            position = frame.kind == Kind.POSITION
            limit = wire.unpack(frame.payload, wire.Position).limit if position else frame.sequence
            with self._changed:
                self._granted[frame.stream] = limit
                self._changed.notify_all()

    def close(self) -> None: ...

    def abort(self) -> None: ...


class End(Connection):
    """One end of a connection in memory, which may damage what is written to it."""

    def __init__(self, damage: Callable[[bytes], list[bytes]]) -> None:
        super().__init__("peer", "memory")
        self.allowed_bytes = 1 << 20
        self.other: End
        self.moved = 0
        self._damage = damage
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False

    def _receive(self) -> Sequence[Frame]:
        message = None if self._closed else self._inbox.get()
        if message is None or self._closed:
            self._close()
            raise ConnectionClosed("closed")
        self.moved += 1
        return decode_all(message, self.allowed_bytes)

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        if self._closed:
            raise ConnectionClosed("closed")
        for message in self._damage(encode([frame])):
            self.other._inbox.put(message)

    def close(self) -> None:
        self._close()

    def abort(self) -> None:
        self._close()

    def _close(self) -> None:
        self._closed = self.other._closed = True
        self._inbox.put(None)
        self.other._inbox.put(None)


def linked(one: Callable[[bytes], list[bytes]], other: Callable[[bytes], list[bytes]]) -> tuple[End, End]:
    """Return the two ends of a connection."""
    ends = End(one), End(other)
    ends[0].other, ends[1].other = ends[1], ends[0]
    return ends


WILD: list[Any] = [None, -1, 0, 1, 2, 255, 2**31, 2**32, 2**63, 2**64 - 1, "", "note", "model", "x" * 300, "../../x"]
WILD += [b"", bytes(32), b"x" * 3_000, [], {}, [[]] * 50, 1.5, True, "bytes", "file", "quantized", "none", "object"]


def sealed(frame: bytearray) -> bytearray:
    """Make length and both CRCs fit again, as someone who attacks would."""
    if len(frame) >= HEADER_BYTES:
        struct.pack_into("<II", frame, 16, len(frame) - HEADER_BYTES, zlib.crc32(frame[HEADER_BYTES:]))
        struct.pack_into("<I", frame, 24, zlib.crc32(frame[:24]))
    return frame


def altered(frame: bytearray, dice: random.Random) -> bytearray:
    """Change the bytes of one frame."""
    way = dice.randrange(7)
    if way == 0:
        frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
    elif way == 1:
        del frame[dice.randrange(len(frame)) :]
    elif way == 2:
        frame += dice.randbytes(dice.randrange(1, 40))
    elif way == 3:
        begin = dice.randrange(len(frame))
        frame[begin : begin + 4] = dice.choice([bytes(4), b"\xff" * 4, dice.randbytes(4)])
    elif way == 4 and len(frame) >= 20:
        at = dice.choice([8, 12, 16])
        struct.pack_into("<I", frame, at, dice.choice([0, 1, 2, 3, 4, 5, 7, 4_097, 2**31, 2**32 - 1]))
    elif way == 5 and len(frame) > 5:
        frame[5] = dice.randrange(20)
    else:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            content = msgspec.msgpack.decode(bytes(frame[HEADER_BYTES:]))
            if isinstance(content, dict) and content:
                content[dice.choice(list(content))] = dice.choice(WILD)
                frame[HEADER_BYTES:] = msgspec.msgpack.encode(content)
    return frame


def mutated(frames: Sequence[bytes], dice: random.Random) -> list[bytes]:
    """Return a conversation with one to four changes."""
    frames = list(frames)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        at, other = dice.randrange(len(frames)), dice.randrange(len(frames))
        way = dice.randrange(10)
        if way == 0:
            frames.insert(other, frames[at])
        elif way == 1 and len(frames) > 1:
            del frames[at]
        elif way == 2:
            frames[at], frames[other] = frames[other], frames[at]
        elif frames[at]:
            frame = altered(bytearray(frames[at]), dice)
            frames[at] = bytes(sealed(frame) if dice.random() < 0.75 else frame)
    return frames


class Judge:
    """Damages conversations, and fails on anything but a refusal or the original.

    Parameters
    ----------
    folder : Path
        For sources and spool files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spools = [folder / name for name in ("spool", "there", "here")]
        self._frames: dict[str, list[bytes]] = {}
        self._answers: dict[str, list[bytes]] = {}
        self._originals: dict[str, list[Found]] = {}
        self._relinked = 0
        for name in CONVERSATIONS:
            self._record(name)

    def _record(self, name: str) -> None:
        """Hold a conversation as it should be, and note down all that is said."""
        said: tuple[list[bytes], list[bytes]] = ([], [])

        def note(side: int) -> Callable[[bytes], list[bytes]]:
            return lambda message: said[side].append(message) or [message]  # type: ignore[func-returns-value]

        got, outcomes = self._converse(name, [linked(note(0), note(1))])
        assert outcomes == ["sent"] * len(CONVERSATIONS[name]), outcomes
        assert len(got) == len(CONVERSATIONS[name])
        self._frames[name], self._answers[name], self._originals[name] = said[0], said[1], got

    def original(self, name: str) -> list[Found]:
        """Return what a conversation delivers."""
        return self._originals[name]

    def frames(self, name: str, beginning: str = "none") -> list[bytes]:
        """Return what is said in a conversation to the end that receives, which may have a file's first chunk."""
        frames = list(self._frames[name])
        if name == "file" and beginning == "right":
            del frames[1]
        elif name == "file" and beginning == "wrong":
            frames.insert(1, encode([make(Kind.RESTART, 1)]))
        return frames

    def sending(self, name: str, dice: random.Random) -> str:
        """Let someone say a damaged conversation to a session."""
        beginning = dice.choice(BEGINNINGS)
        return self.say(name, mutated(self.frames(name, beginning), dice), beginning=beginning)

    def say(self, name: str, messages: Sequence[bytes], *, patience_s: float = 0.02, beginning: str = "none") -> str:
        """Say `messages` to a session, and return how it ended."""
        if name == "file":
            self._leave_a_beginning(beginning)
        got: list[Found] = []
        connection = Scripted(messages, 0 if name == "file" else WINDOW, patience_s)
        here = self._session(self._spools[0], got)
        connection.streams = lambda: list(here._receiver._streams.values())
        reason = here.carry(connection, WINDOW)
        here.end("over")
        Pool.wait()
        originals = self._originals[name]
        for found in got:
            assert found in originals, (name, found[:2], reason)
        openings = collections.Counter(
            number for number, message in enumerate(messages) if message[5:6] in (b"\x06", b"\x07")
        )
        assert len(got) <= len(openings)
        if reason.startswith("protocol error: "):
            return "refused"
        assert reason == "closed by the peer", reason
        if len(got) == len(originals):
            return "delivered"
        return "rejected" if connection.answers["REJECTED"] else "unfinished"

    def _leave_a_beginning(self, beginning: str) -> None:
        transfer = _file(self._folder).transfer()
        sink = sinks.SpooledFileSink(
            self._spools[0], sinks.Opening("site-1", "file", b"", "file", len(FILE), transfer), 8
        )
        sink.restart()
        if beginning == "none":
            return sink.abort()
        sink.write(memoryview(FILE if beginning == "right" else bytes(CHUNK))[:CHUNK])
        return sink.suspend()

    def answering(self, name: str, dice: random.Random) -> str:
        """Damage what is said on a connection between two sessions; later ones are as they should be."""
        attacks = dice.random() < 0.5
        lengths = len(self._frames[name]), len(self._answers[name])
        plan = [
            (dice.randrange(2), dice.randrange(max(lengths)), dice.randrange(5)) for _ in range(dice.choice([1, 2]))
        ]
        held: list[bytes] = []

        def damage(side: int) -> Callable[[bytes], list[bytes]]:
            count = -1

            def change(message: bytes) -> list[bytes]:
                nonlocal count
                count += 1
                changed = [message]
                for where, when, way in plan:
                    if (where, when % lengths[side]) != (side, count):
                        continue
                    if way == 0:
                        changed *= 2
                    elif way == 1:
                        changed = []
                    elif way == 2:
                        held.append(message)
                        return []
                    else:
                        frame = altered(bytearray(message), dice)
                        changed = [bytes(sealed(frame) if attacks else frame)]
                if held:
                    changed.append(held.pop())
                return changed

            return change

        got, outcomes = self._converse(name, [linked(damage(0), damage(1))])
        originals = self._originals[name]
        for found in got:
            assert found in originals, (name, found[:2], outcomes)
        if not attacks:
            # whatever a network does to frames, every message comes once
            assert outcomes == ["sent"] * len(originals), (name, plan, outcomes)
            assert sorted(found[:2] for found in got) == sorted(found[:2] for found in originals), (name, plan)
            return "delivered"
        return "delivered" if len(got) == len(originals) else "refused"

    def over_links(self, name: str, links: list[tuple[End, End]]) -> int:
        """Return how many connections a conversation takes whose first ones are given."""
        before = self._relinked
        got, _ = self._converse(name, links, quiet_s=0.4)
        assert got == self._originals[name]
        return self._relinked - before

    def _converse(
        self, name: str, links: list[tuple[End, End]], quiet_s: float = QUIET_S
    ) -> tuple[list[Found], list[str]]:
        """Send a conversation's messages from one session to another, over one connection after the other."""
        got: list[Found] = []
        outcomes: list[str] = []
        there, here = self._session(self._spools[1], []), self._session(self._spools[2], got)

        def send() -> None:
            for topic, body, make_payload in CONVERSATIONS[name]:
                try:
                    there.send(topic, body, make_payload(self._folder), None)
                    outcomes.append("sent")
                except TransportError as error:
                    outcomes.append(str(error))
            done.set()

        done = threading.Event()
        Pool.start(send)
        relinked = 0
        while not done.is_set():
            assert relinked <= 2 * session.MOST_FRUITLESS, ("a sender hangs", name, outcomes)
            ends = links.pop(0) if links else linked(lambda message: [message], lambda message: [message])
            self._carry(there, here, ends, done, quiet_s)
            relinked += 1
            self._relinked += 1
            if there.over or here.over:
                # an end that has closed tells so when it is dialled again
                there.end("over")
                here.end("over")
                assert done.wait(PATIENCE_S), "a sender hangs"
        there.end("over")
        here.end("over")
        Pool.wait()
        return got, outcomes

    @staticmethod
    def _carry(
        there: session.Session, here: session.Session, ends: tuple[End, End], done: threading.Event, quiet_s: float
    ) -> None:
        over = threading.Semaphore(0)

        def carry(one: session.Session, end: End) -> None:
            try:
                one.carry(end, WINDOW)
            finally:
                end.abort()
                over.release()

        Pool.start(lambda: carry(there, ends[0]))
        Pool.start(lambda: carry(here, ends[1]))
        moved = -1
        while not done.wait(quiet_s) and not ends[0]._closed:
            if moved == (moved := ends[0].moved + ends[1].moved):
                break
        ends[0].abort()
        for _ in range(2):
            assert over.acquire(timeout=PATIENCE_S), "a reader hangs"

    def shaking_hands(self, dice: random.Random) -> str:
        """Damage the first frame that either end hears."""
        hello = handshake.Hello((1,), "0.1.0", bytes(16), 4711, WINDOW, dice.choice([None, bytes(16)]))
        welcome = handshake.Welcome(1, "0.1.0", "site-1", WINDOW, bytes(16), bytes(16))
        listens = dice.random() < 0.5
        first = make(Kind.HELLO if listens else Kind.WELCOME, payload=wire.pack(hello if listens else welcome))
        connection = Scripted(mutated([encode([first])], dice))
        try:
            if listens:
                heard = handshake.listen_for(connection, LIMITS)
                handshake.settle(heard)
                assert len(heard.instance) == 16
                assert heard.session is None or len(heard.session) == 16
            else:
                answer = handshake.greet(connection, LIMITS, bytes(16), None)
                assert answer.version == 1
                assert len(answer.instance) == 16
        except (ProtocolError, RefusedError, PeerUnreachable):
            return "refused"
        return "delivered"

    def _session(self, folder: Path, got: list[Found]) -> session.Session:
        def take(message: Received) -> None:
            got.append((message.topic, message.body, as_value(message.payload)))

        made = session.Session("site-1", limits=LIMITS, spool=folder, sinks=SINKS, deliver=take)
        made.announced.set()
        return made

    def run(self, seed: int, count: int) -> Verdict:
        """Judge `count` mutations: of ten, eight are said to a session, one is between two, one is a handshake."""
        dice = random.Random(seed)
        names = list(CONVERSATIONS)
        verdicts: Verdict = collections.Counter()
        for number in range(count):
            name = dice.choice(names)
            own = random.Random(dice.getrandbits(64))
            where = number % 10
            try:
                if where == 0:
                    verdict = self.shaking_hands(own)
                elif where == 1:
                    verdict = self.answering(name, own)
                else:
                    verdict = self.sending(name, own)
            except BaseException as error:
                error.add_note(f"mutation {number} of seed {seed}, conversation {name!r}")
                raise
            verdicts[verdict] += 1
        return verdicts


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(seed: int, count: int, folder: Path) -> None:
    """Judge many mutations and print how it went."""
    with small_chunks():
        judge = Judge(folder)
        judge.run(seed, 1_000)  # what grows at first is the interpreter
        before = _resident_bytes()
        verdicts = judge.run(seed + 1, count)
        print(json.dumps({"grown_bytes": _resident_bytes() - before, **verdicts}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
