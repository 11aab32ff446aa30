"""Sessions over connections in memory: what one end must survive of the other, and of its own owner's code."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbio.errors import PeerUnreachable, TransportError
from fedbio.transport import (
    BlobPayload,
    BytesPayload,
    ConsumerSink,
    Credentials,
    FilePayload,
    FileSink,
    Limits,
    Payload,
    Presence,
    Progress,
    Received,
    ServerEndpoint,
    SiteEndpoint,
    handshake,
    wire,
)
from fedbio.transport.drivers import Connection, ConnectionClosed, Lane, load
from fedbio.transport.drivers.base import Source
from fedbio.transport.drivers.outbox import LINGER_S, Outbox
from fedbio.transport.frames import Frame, Kind, make
from fedbio.transport.receiver import REMEMBERED, SinkFactory
from fedbio.transport.session import MOST_FRUITLESS, Session

from .conftest import Inbox, eventually

MIB = 1 << 20


class Script(Connection):
    """A connection whose other end is the test: it says frames, and hears those of the session."""

    def __init__(self) -> None:
        super().__init__("site-1", "nowhere")
        self._said: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[Frame] = queue.SimpleQueue()

    def say(self, *frames: Frame) -> None:
        for frame in frames:
            self._said.put(frame)

    def hear(self) -> Frame:
        return self._heard.get(timeout=10)

    def _receive(self) -> list[Frame]:
        frame = self._said.get()
        if frame is None:
            raise ConnectionClosed("closed")
        return [frame]

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        self._heard.put(frame)

    def close(self) -> None:
        self._said.put(None)

    abort = close


class Pulling(Script):
    """A connection on whose thread frames are made: the test is that thread."""

    pulls = True

    def __init__(self) -> None:
        super().__init__()
        self.sources: queue.SimpleQueue[Source] = queue.SimpleQueue()

    def offer(self, source: Source) -> None:
        self.sources.put(source)

    def source(self) -> Source:
        return self.sources.get(timeout=10)


class Held:
    """A session, and threads that carry it and send over it."""

    def __init__(self, folder: Path, sinks: dict[str, SinkFactory] | None = None, **options: Any) -> None:
        self.inbox = Inbox()
        self.reasons: list[str] = []
        self._limits = Limits(**options.pop("limits", {}))
        self._threads: list[threading.Thread] = []
        self._connections: list[Script] = []
        self._carrying = threading.Lock()
        self.session = Session(
            "peer", limits=self._limits, spool=folder, sinks=sinks or {}, deliver=self.inbox, **options
        )
        self.session.announced.set()

    def carry(self, window: int = 8, kind: type[Script] = Script) -> Any:
        connection = kind()
        if self._connections:
            self._connections[-1].abort()
        self._connections.append(connection)
        self._start(lambda: self._carry(connection, window))
        eventually(lambda: self.session.connection is connection or self.session.over)
        return connection

    def _carry(self, connection: Script, window: int) -> None:
        with self._carrying:
            self.reasons.append(self.session.carry(connection, window))

    def send(self, *args: Any) -> list[object]:
        """Send on another thread; return where the outcome will be."""
        outcome: list[object] = []

        def send() -> None:
            try:
                outcome.append(self.session.send(*args, None))
            except (TransportError, ValueError) as error:
                outcome.append(error)

        self._start(send)
        return outcome

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        self.session.end("over")
        for connection in self._connections:
            connection.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def make_one(**options: Any) -> Held:
        made.append(Held(tmp_path / "spool", **options))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def message(stream: int, topic: str = "note", payload: bytes | None = None) -> Frame:
    kind, content = ("none", b"") if payload is None else ("blob", payload)
    seal = wire.seal(topic, b"", kind, BlobPayload(content).digest())
    return make(Kind.MESSAGE, stream, 0, wire.pack(wire.Message(topic, b"", kind, content, seal)))


def opening(stream: int, size: int | None, topic: str = "model", again: bool = False) -> Frame:
    return make(Kind.OPEN, stream, int(again), wire.pack(wire.Open(topic, b"", "blob", size)))


def ending(stream: int, sequence: int, content: bytes, topic: str = "model") -> Frame:
    seal = wire.seal(topic, b"", "blob", BlobPayload(content).digest())
    return make(Kind.END, stream, sequence, wire.pack(wire.End(len(content), seal)))


def refusal(frame: Frame) -> str:
    assert frame.kind == Kind.REJECTED
    return wire.unpack(frame.payload, wire.Refusal).reason


class Broken(ConsumerSink):
    """A sink with a bug, in the method of the given name."""

    def __init__(self, where: str) -> None:
        super().__init__(lambda chunk: None)
        setattr(self, where, self._fail)

    def _fail(self, *args: object) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("where", ["make", "write", "finish"])
@pytest.mark.parametrize("whole", [True, False], ids=["message", "stream"])
def test_failing_consumer_is_answered_and_the_session_goes_on(
    hold: Callable[..., Held], where: str, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def factory(opening: object) -> Broken:
        if where == "make":
            raise KeyError(where)
        return Broken(where)

    held = hold(sinks={"model": factory})
    connection = held.carry()
    if whole:
        connection.say(message(1, "model", b"abc"))
    else:
        connection.say(opening(1, 3), make(Kind.CHUNK, 1, 0, b"abc"), ending(1, 1, b"abc"))
    assert refusal(connection.hear()) == "its consumer has failed there"
    assert "a consumer has failed" in caplog.text
    for number in range(2, 200):  # nothing is held by what has failed
        connection.say(message(number))
        assert connection.hear().kind == Kind.ACCEPTED


@pytest.mark.parametrize(
    ("topic", "payload", "text"),
    [
        ("", None, "a topic of 0 characters; expected 1 to 200"),
        ("x" * 201, None, "a topic of 201 characters; expected 1 to 200"),
        ("x", BytesPayload([bytes(MIB), bytes(MIB)], size=10), "a payload of 2097152 bytes, declared as 10"),
        ("x", BytesPayload([b"abc"], size=10), "a payload of 3 bytes, declared as 10"),
    ],
)
def test_message_that_its_receiver_could_not_read_is_not_sent(
    hold: Callable[..., Held], topic: str, payload: Payload | None, text: str
) -> None:
    held = hold()
    held.carry()
    with pytest.raises(ValueError, match=text):
        held.session.send(topic, b"", payload, None)


def test_long_stream_is_remembered_after_thousands_of_short_ones(hold: Callable[..., Held]) -> None:
    held = hold()
    connection = held.carry()
    connection.say(opening(1, 6), make(Kind.CHUNK, 1, 0, b"abc"))
    for number in range(2, REMEMBERED + 10):
        connection.say(message(number))
        assert connection.hear().kind == Kind.ACCEPTED
    connection.close()
    connection = held.carry()
    connection.say(opening(1, 6, again=True))
    assert (frame := connection.hear()).kind == Kind.POSITION
    assert frame.sequence == 1
    connection.say(make(Kind.CHUNK, 1, 1, b"def"), ending(1, 2, b"abcdef"))
    assert connection.hear().kind == Kind.ACCEPTED


def test_message_that_was_sent_before_the_first_connection_has_its_window(hold: Callable[..., Held]) -> None:
    held = hold(limits={"window_chunks": 4})
    outcome = held.send("model", b"", BytesPayload([bytes([number]) * 10 for number in range(9)]))
    connection = held.carry(window=6)
    assert connection.hear().kind == Kind.OPEN
    assert [connection.hear().sequence for _ in range(4)] == [0, 1, 2, 3]  # the smaller of the two windows
    connection.say(make(Kind.CREDIT, 1, 6))
    assert [connection.hear().sequence for _ in range(2)] == [4, 5]
    connection.close()
    connection = held.carry(window=6)
    assert (connection.hear().kind, connection._heard.empty()) == (Kind.OPEN, True)
    connection.say(make(Kind.POSITION, 1, 2, wire.pack(wire.Position(6))))
    assert [bytes(connection.hear().payload[:1]) for _ in range(4)] == [b"\2", b"\3", b"\4", b"\5"]
    connection.say(make(Kind.CREDIT, 1, 10))
    assert [connection.hear().kind for _ in range(4)] == [Kind.CHUNK] * 3 + [Kind.END]
    connection.say(make(Kind.ACCEPTED, 1))
    eventually(lambda: outcome)
    assert outcome[0].bytes == 90  # type: ignore[attr-defined]


def test_window_of_a_receiver_is_the_smaller_one(hold: Callable[..., Held]) -> None:
    gate = threading.Event()
    held = hold(limits={"window_chunks": 8}, sinks={"model": lambda opening: ConsumerSink(lambda chunk: gate.wait(10))})
    connection = held.carry(window=2)
    connection.say(opening(1, None), *(make(Kind.CHUNK, 1, number, b"x") for number in range(3)))
    assert refusal(connection.hear()) == "more chunks than the window grants"
    gate.set()


def ask(held: Held, within_s: float) -> list[bool]:
    answer: list[bool] = []
    held._start(lambda: answer.append(held.session.shows_life(within_s)))
    return answer


def test_life_is_an_answer_to_the_question(hold: Callable[..., Held]) -> None:
    held = hold()
    connection = held.carry()
    answer = ask(held, 5.0)
    question = connection.hear()
    assert question.kind == Kind.PING
    assert not answer
    connection.say(make(Kind.PONG, 0, question.sequence))
    eventually(lambda: answer == [True])


def test_what_was_under_way_is_no_sign_of_life(hold: Callable[..., Held]) -> None:
    """A process that was killed leaves frames behind that are read only later."""
    held = hold()
    connection = held.carry()
    answer = ask(held, 0.4)
    assert connection.hear().kind == Kind.PING
    connection.say(make(Kind.PONG), message(1))
    eventually(lambda: answer == [False])
    assert held.session.connection is connection


def test_peer_whose_answer_is_late_but_goes_on_sending_lives(hold: Callable[..., Held]) -> None:
    held = hold()
    connection = held.carry()
    answer = ask(held, 0.4)
    for _ in range(40):
        connection.say(make(Kind.PING))
        if answer:
            break
        time.sleep(0.02)
    eventually(lambda: answer == [True])


def test_connection_that_ends_and_its_successor_show_no_life_by_themselves(hold: Callable[..., Held]) -> None:
    held = hold()
    held.carry()
    answer = ask(held, 0.4)
    held.carry()
    eventually(lambda: answer == [False])


def test_session_that_only_errors_end_is_given_up(hold: Callable[..., Held]) -> None:
    held = hold()
    outcome = held.send("model", b"", BytesPayload([b"abc"]))
    for _ in range(MOST_FRUITLESS):
        assert held.session.over is None
        connection = held.carry()
        connection.say(make(Kind.ACCEPTED, 77))
        eventually(lambda: held.session.connection is None)
    eventually(lambda: outcome)
    assert isinstance(outcome[0], PeerUnreachable)
    assert "an answer about stream 77, which was never opened" in str(outcome[0])


def test_damage_that_lets_something_pass_ends_no_session(hold: Callable[..., Held]) -> None:
    held = hold()
    for number in range(1, 3 * MOST_FRUITLESS):
        connection = held.carry()
        connection.say(opening(number, 6), make(Kind.CHUNK, number, 0, b"abc"), make(Kind.HELLO))
        eventually(lambda: held.session.connection is None)
    assert held.session.over is None


def test_cancel_is_heard_at_once_and_what_it_overtook_is_ignored(hold: Callable[..., Held]) -> None:
    held = hold()
    connection = held.carry()
    connection.say(opening(1, 9), make(Kind.CHUNK, 1, 0, b"abc"), make(Kind.CANCEL, 1), make(Kind.CHUNK, 1, 1, b"def"))
    assert refusal(connection.hear()) == "cancelled by the sender"
    connection.say(message(2))
    assert connection.hear().kind == Kind.ACCEPTED


def test_message_with_a_wrong_digest_is_handled_when_it_comes_right(hold: Callable[..., Held]) -> None:
    held = hold()
    connection = held.carry()
    damaged = message(1, payload=b"abc")
    connection.say(make(Kind.MESSAGE, 1, 0, bytes(damaged.payload).replace(b"abc", b"abd")))
    eventually(lambda: held.reasons)
    assert held.reasons == ["protocol error: message 'note' does not match its digest"]
    connection = held.carry()
    connection.say(message(1, payload=b"abc"))
    assert connection.hear().kind == Kind.ACCEPTED
    assert bytes(held.inbox.wait(1)[0].payload.content) == b"abc"  # type: ignore[attr-defined]


def test_chunks_of_what_is_in_memory_are_made_when_they_are_pulled(hold: Callable[..., Held]) -> None:
    held = hold()
    connection = held.carry(window=2, kind=Pulling)
    content = bytes(range(256)) * (10 << 10)  # 2.5 MiB
    outcome = held.send("model", b"", BlobPayload(content))
    assert connection.hear().kind == Kind.OPEN
    source = connection.source()
    assert [bytes(source().payload) for _ in range(2)] == [content[:MIB], content[MIB : 2 * MIB]]
    # the window is full; it is offered again when there is room, and only once
    assert source() is None
    assert connection.sources.empty()
    connection.say(make(Kind.CREDIT, 1, 3), make(Kind.CREDIT, 1, 4))
    source = connection.source()
    assert bytes(source().payload) == content[2 * MIB :]
    end = source()
    assert wire.unpack(end.payload, wire.End).size == len(content)
    assert source() is None
    connection.say(make(Kind.ACCEPTED, 1))
    eventually(lambda: outcome)
    assert outcome[0].bytes == len(content)  # type: ignore[attr-defined]
    assert connection.sources.empty()


def test_new_connection_pulls_from_where_its_receiver_is_and_the_old_one_no_more(hold: Callable[..., Held]) -> None:
    held = hold()
    first = held.carry(kind=Pulling)
    content = bytes(range(256)) * (12 << 10)  # 3 MiB
    outcome = held.send("model", b"", BlobPayload(content))
    stale = first.source()
    assert [stale().sequence, stale().sequence] == [0, 1]
    second = held.carry(kind=Pulling)
    assert stale() is None
    assert second.hear().sequence == 1  # asks where it stands
    assert second.sources.empty()
    second.say(make(Kind.POSITION, 1, 1, wire.pack(wire.Position(limit=9))))
    source = second.source()
    assert [frame.sequence for frame in (source(), source(), source())] == [1, 2, 3]
    assert source() is None
    second.say(make(Kind.ACCEPTED, 1))
    eventually(lambda: outcome)
    assert outcome[0].bytes == len(content)  # type: ignore[attr-defined]


def test_error_while_a_chunk_is_pulled_reaches_the_sender(hold: Callable[..., Held]) -> None:
    class Damaged(BlobPayload):
        def chunks(self, start: int = 0) -> Iterator[memoryview]:
            yield memoryview(bytes(MIB))
            raise ValueError("what follows is damaged")

    held = hold()
    connection = held.carry(kind=Pulling)
    outcome = held.send("model", b"", Damaged(bytes(2 * MIB)))
    source = connection.source()
    assert source().sequence == 0
    assert source() is None
    eventually(lambda: outcome)
    assert str(outcome[0]) == "what follows is damaged"
    assert [connection.hear().kind for _ in range(2)] == [Kind.OPEN, Kind.CANCEL]


@pytest.mark.parametrize("kind", [Script, Pulling])
def test_cancelled_payload_ends_what_is_under_way_and_what_is_to_come(
    hold: Callable[..., Held], kind: type[Script]
) -> None:
    held = hold()
    connection = held.carry(window=1, kind=kind)
    payload = BlobPayload(bytes(3 * MIB))
    outcome = held.send("model", b"", payload)
    assert connection.hear().kind == Kind.OPEN
    time.sleep(0.05)
    assert not outcome
    payload.cancel()
    eventually(lambda: outcome)
    assert str(outcome[0]) == "peer: model was cancelled here"
    assert Kind.CANCEL in (connection.hear().kind, connection.hear().kind if kind is Script else None)
    later = held.send("model", b"", payload)
    eventually(lambda: later)
    assert str(later[0]) == "peer: model was cancelled here"


def test_sources_and_queued_frames_take_turns_behind_urgent_ones() -> None:
    outbox = Outbox()
    numbers = {1: iter(range(3)), 2: iter(range(2))}

    def source(stream: int) -> Callable[[], Frame | None]:
        return lambda: next((make(Kind.CHUNK, stream, number) for number in numbers[stream]), None)

    outbox.put(make(Kind.CHUNK, 9, 0), Lane.BULK)
    outbox.offer(source(1))
    outbox.offer(source(2))
    outbox.put(make(Kind.PING), Lane.URGENT)
    outbox.close("enough", drop=False)
    taken = []
    while (frames := outbox.take()) is not None:
        taken += [(frame.kind, frame.stream, frame.sequence) for frame in frames]
    assert taken[0] == (Kind.PING, 0, 0)
    assert sorted(taken[1:3]) == [(Kind.CHUNK, 1, 0), (Kind.CHUNK, 9, 0)]
    assert [each[1:] for each in taken[3:]] == [(2, 0), (1, 1), (2, 1), (1, 2)]


def test_failing_progress_callback_stops_no_transfer(
    hold: Callable[..., Held], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError

    held = hold(on_progress=fail)
    connection = held.carry()
    connection.say(opening(1, 3), make(Kind.CHUNK, 1, 0, b"abc"), ending(1, 1, b"abc"))
    assert connection.hear().kind == Kind.ACCEPTED
    assert "a progress callback failed" in caplog.text


def test_progress_of_a_file_that_goes_on_counts_what_was_there(hold: Callable[..., Held], tmp_path: Path) -> None:
    told: list[Progress] = []
    held = hold(on_progress=told.append, sinks={"file": lambda opening: FileSink(tmp_path / "target", opening)})
    source = tmp_path / "source"
    source.write_bytes(bytes(3 * MIB))
    payload = FilePayload(source)
    outcome = held.send("file", b"", payload)
    connection = held.carry()
    assert connection.hear().kind == Kind.OPEN
    prefix = BlobPayload(bytes(2 * MIB)).digest()
    connection.say(make(Kind.POSITION, 1, 2, wire.pack(wire.Position(10, prefix))))
    assert connection.hear().sequence == 2
    connection.hear()
    connection.say(make(Kind.ACCEPTED, 1))
    eventually(lambda: outcome)
    assert (told[-1].bytes, told[-1].skipped, told[-1].total) == (3 * MIB, 2 * MIB, 3 * MIB)


def test_frames_that_are_dropped_while_one_waits_for_company_end_the_flow() -> None:
    for _ in range(20):
        outbox = Outbox()
        taken: list[object] = []
        thread = threading.Thread(target=lambda outbox=outbox, taken=taken: taken.append(outbox.take()))  # type: ignore[misc]
        thread.start()
        outbox.put(make(Kind.ACCEPTED, 1), Lane.LAZY)
        time.sleep(LINGER_S / 4)
        outbox.close("cut", drop=True)
        thread.join(5)
        assert not thread.is_alive()
        assert taken[0] is None or len(taken[0]) == 1  # type: ignore[arg-type]


def test_site_whose_session_was_forgotten_begins_a_new_one_even_if_its_welcome_was_lost(
    kits: Path, tmp_path: Path
) -> None:
    at_server: list[str] = []
    server = ServerEndpoint(
        "127.0.0.1:0",
        Credentials.from_kit(kits / "server"),
        spool=tmp_path,
        on_message=lambda message: at_server.append(message.topic),
        driver="memory",
    )
    at_site, there = Inbox(), Inbox()
    site = SiteEndpoint(
        server.address,
        Credentials.from_kit(kits / "site-1"),
        spool=tmp_path,
        on_message=at_site,
        on_connection=there,
        driver="memory",
    )
    with server, site:
        server.send("site-1", "before")
        session = site._current
        assert session is not None
        # the server forgets it, and the WELCOME of the next session gets lost on its way to the site
        server._expire(server._peers["site-1"].session)
        lost = load("memory").dial(server.address, Credentials.from_kit(kits / "site-1"), 5.0)
        handshake.greet(lost, Limits(), site._instance, session.id)
        lost.abort()
        assert session.connection is not None
        session.connection.abort()
        there.wait(4)
        eventually(lambda: server.peers() == ("site-1",))
        server.send("site-1", "after", timeout_s=10)
        assert [message.topic for message in at_site.wait(2)] == ["before", "after"]  # type: ignore[attr-defined]
        assert there.items[:4] == [Presence.ARRIVED, Presence.LOST, Presence.GONE, Presence.ARRIVED]
        site.send("up", timeout_s=10)
        eventually(lambda: at_server == ["up"])


def test_site_that_is_closed_while_it_dials_anew_leaves_no_connection_behind(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"spool": tmp_path, "driver": "memory"}
    server = ServerEndpoint("127.0.0.1:0", Credentials.from_kit(kits / "server"), on_message=print, **options)
    site = SiteEndpoint(server.address, Credentials.from_kit(kits / "site-1"), on_message=print, **options)
    with server, site:
        session, enter = site._current, site._enter
        assert session is not None
        assert session.connection is not None
        closing = threading.Thread(target=site.close)
        entered = threading.Event()

        def late(welcome: handshake.Welcome) -> Session:
            closing.start()
            eventually(lambda: session.over)
            try:
                return enter(welcome)
            finally:
                entered.set()

        monkeypatch.setattr(site, "_enter", late)
        session.connection.abort()
        assert entered.wait(10)
        closing.join(10)
        eventually(lambda: not server.peers())
        assert site._reader is not None
        site._reader.join(10)
        assert not site._reader.is_alive()


def test_pieces_for_two_reach_the_one_who_is_here(kits: Path, tmp_path: Path) -> None:
    inbox = Inbox()
    options: dict[str, Any] = {"spool": tmp_path, "driver": "memory"}
    server = ServerEndpoint("127.0.0.1:0", Credentials.from_kit(kits / "server"), on_message=print, **options)
    site = SiteEndpoint(server.address, Credentials.from_kit(kits / "site-1"), on_message=inbox, **options)
    payload = BytesPayload((bytes(MIB) for _ in range(40)), readers=2)
    with server, site:
        with pytest.raises(PeerUnreachable, match="site-2 is not connected"):
            server.send("site-2", "model", b"", payload)
        server.send("site-1", "model", b"", payload, timeout_s=20)
        [message] = inbox.wait(1)
        assert isinstance(message, Received)
        assert message.payload.size == 40 * MIB
