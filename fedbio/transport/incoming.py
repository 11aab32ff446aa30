"""Take in the streams of one peer: every size, number and digest is checked, memory is taken only after its cap."""

from __future__ import annotations

__all__ = ["Received", "Receiver"]

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from fedbio.errors import FedbioError, ProtocolError, TransportError
from fedbio.transport import wire
from fedbio.transport.drivers import Lane
from fedbio.transport.frames import Frame, Kind, make
from fedbio.transport.limits import MAX_BODY_BYTES, Limits
from fedbio.transport.metering import Meter, OnProgress
from fedbio.transport.objects import CHUNK_BYTES
from fedbio.transport.sinks import MemorySink, Opening, Sink, SpooledFileSink, SpoolSink, TensorSink
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Streams whose outcome is remembered, for a sender who has missed the answer."""

COMPARED_BYTES_PER_S = 50 << 20
"""What a sender's disk yields at least, when the beginning of a file is read again to compare it with what is here."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message that has arrived whole."""

    peer: str
    """Who sent it: the name in the sender's certificate."""
    topic: str
    body: bytes
    payload: Any
    """What the payload's sink made of it: a `ReceivedPayload` unless the topic has a sink of its own; None if none was
    sent."""


SinkFactory = Callable[[Opening], Sink]

Agreed = Callable[[Opening], Collection[str]]
"""Returns the quantization schemes in which a model may come."""

Reply = Callable[[Frame, Lane], None]


class Receiver:
    """The incoming half of a session.

    `take` runs on the thread that reads the connection: it checks, and moves what only moves memory. What may wait for
    a disk or a consumer runs on collectors, what may wait for anything on handlers.
    """

    def __init__(
        self,
        peer: str,
        limits: Limits,
        spool: Path,
        sinks: Mapping[str, SinkFactory],
        reply: Reply,
        deliver: Callable[[Received], None],
        on_progress: OnProgress | None = None,
        schemes: Agreed | None = None,
    ) -> None:
        self.peer = peer
        self.limits = limits
        self.window = limits.window_chunks
        self._spool = spool
        self._sinks = sinks
        self.reply = reply
        self._deliver = deliver
        self._on_progress = on_progress
        self._schemes = schemes
        self._collectors = Workers(f"{peer}-collect", limits.max_messages)
        self._handlers = Workers(f"{peer}-handle", limits.max_messages)
        self._streams: dict[int, Incoming] = {}
        self._outcomes: collections.OrderedDict[int, Frame | None] = collections.OrderedDict()
        self._highest = 0
        self._lock = threading.Lock()
        self._messages = 0
        self._memory = 0
        self._freed: collections.deque[int] = collections.deque()

    def take(self, frame: Frame) -> None:
        """Take one frame in; raise `ProtocolError` if the peer broke the rules."""
        if frame.kind in (Kind.MESSAGE, Kind.OPEN):
            self._take_opening(frame)
        elif incoming := self._streams.get(frame.stream):
            incoming.take(frame)
        elif frame.stream > self._highest:
            raise ProtocolError(f"{Kind(frame.kind).name} of stream {frame.stream}, which was never opened")
        # else it is of a stream that was rejected here while it was under way

    def agree(self, window: int) -> int:
        """Return the window of streams from now on: neither end keeps or takes more chunks than it likes."""
        self.window = min(window, self.limits.window_chunks)
        return self.window

    def sweep(self) -> None:
        """Give up streams on which nothing moves although it could."""
        for incoming in list(self._streams.values()):
            incoming.check_idle()

    def restart_clocks(self) -> None:
        """A new connection stands: streams have their whole idle time again."""
        for incoming in list(self._streams.values()):
            incoming.heard = time.monotonic()

    def close(self) -> None:
        """Give up what has not arrived whole."""
        for incoming in list(self._streams.values()):
            incoming.abandon()
        # what was accepted is still handled
        self._collectors.close()
        self._handlers.close()

    def _take_opening(self, frame: Frame) -> None:
        stream = frame.stream
        with self._lock:
            known = stream in self._outcomes
            outcome = self._outcomes.get(stream)
        # sent again after a break: it is answered again, never handled again
        if outcome is not None:
            return self.reply(outcome, Lane.URGENT)
        if incoming := self._streams.get(stream):
            return incoming.reply_position()
        if known:
            return None  # it is being taken in, and will be answered
        if stream <= self._highest - REMEMBERED or stream == 0:
            raise ProtocolError(f"stream {stream} opened after stream {self._highest}")
        if frame.kind == Kind.MESSAGE:
            return self._take_message(stream, _whole(frame))
        self._take_open(stream, wire.unpack(frame.payload, wire.Open))
        if frame.sequence and (incoming := self._streams.get(stream)):
            incoming.reply_position()
        return None

    def _remember(self, stream: int) -> None:
        self._highest = max(self._highest, stream)
        with self._lock:
            self._outcomes[stream] = None
            self._forget()

    def _take_message(self, stream: int, message: wire.Message) -> None:
        self._remember(stream)
        if not self._enter():
            return self._reject(stream, self._busy)
        opening = Opening(self.peer, message.topic, message.body, message.kind, len(message.payload))
        if message.kind == "none":
            return self._hand_over(stream, Received(self.peer, message.topic, message.body, None))

        def collect() -> None:
            sink = None
            try:
                sink = self._sink(opening)
                sink.write(memoryview(message.payload))
                payload = sink.finish()
            except Exception as error:
                if sink is not None:
                    sink.abort()
                self._reject(stream, _why(error))
                return self._leave()
            return self._hand_over(stream, Received(self.peer, message.topic, message.body, payload))

        if message.topic in self._sinks:
            return self._collectors.submit(collect)
        return collect()

    def _take_open(self, stream: int, content: wire.Open) -> None:
        self._remember(stream)
        size = content.size or 0
        if len(content.body) > MAX_BODY_BYTES:
            self._reject(stream, f"a body of {len(content.body)} bytes, at most {MAX_BODY_BYTES} are allowed")
        elif size > self.limits.max_payload_bytes:
            self._reject(stream, f"a payload of {size} bytes, at most {self.limits.max_payload_bytes} are allowed")
        elif not self._enter():
            self._reject(stream, self._busy)
        else:
            opening = Opening(self.peer, content.topic, content.body, content.kind, content.size, content.transfer)
            meter = Meter(self._on_progress, self.peer, opening.topic, outgoing=False, total=opening.size)
            incoming = Incoming(self, stream, opening, meter)
            self._streams[stream] = incoming
            if content.topic not in self._sinks and (sink := self._quick_sink(opening)) is not None:
                incoming.begin(sink)
            else:
                self._collectors.submit(lambda: incoming.collect(lambda: self._sink(opening)))

    def _quick_sink(self, opening: Opening) -> Sink | None:
        """Return a sink in memory, if there is room and nothing has to be done with the bytes."""
        if opening.size is None or opening.transfer is not None or opening.kind in ("file", "quantized"):
            return None
        return self._memory_sink(opening, opening.size)

    def _sink(self, opening: Opening) -> Sink:
        """Return the sink for a message; it may take a while."""
        if opening.topic in self._sinks:
            return self._sinks[opening.topic](opening)
        if opening.kind == "quantized":
            agreed = None if self._schemes is None else self._schemes(opening)
            return TensorSink(lambda size: self._store(opening, size), agreed)
        if opening.kind == "file" and opening.transfer is not None:
            return SpooledFileSink(self._spool, opening, self.limits.max_partial_files)
        return self._store(opening, opening.size)

    def _store(self, opening: Opening, size: int | None) -> Sink:
        if size is not None and size > self.limits.max_payload_bytes:
            raise TransportError(f"a payload of {size} bytes, at most {self.limits.max_payload_bytes} are allowed")
        sink = None if size is None else self._memory_sink(opening, size)
        return SpoolSink(self._spool, size) if sink is None else sink

    def _memory_sink(self, opening: Opening, size: int) -> Sink | None:
        with self._lock:
            while self._freed:
                self._memory -= self._freed.pop()
            if self._memory + size > self.limits.memory_bytes:
                return None
            self._memory += size
        return MemorySink(size, on_freed=lambda: self._freed.append(size))

    def deliver(self, stream: int, opening: Opening, payload: Any) -> None:
        """A stream has come whole."""
        self._hand_over(stream, Received(self.peer, opening.topic, opening.body, payload))
        self._streams.pop(stream, None)

    def refuse(self, stream: int, reason: str) -> None:
        """A stream is not taken."""
        self._streams.pop(stream, None)
        self._reject(stream, reason)
        self._leave()

    def _hand_over(self, stream: int, received: Received) -> None:
        def handle() -> None:
            # a reply is often not far: let the two leave together
            self._answer(make(Kind.ACCEPTED, stream), Lane.LAZY)
            try:
                self._deliver(received)
            finally:
                self._leave()

        self._handlers.submit(handle)

    def _reject(self, stream: int, reason: str) -> None:
        log.info("message rejected peer=%s stream=%d reason=%s", self.peer, stream, reason)
        self._answer(make(Kind.REJECTED, stream, 0, wire.pack(wire.Refusal(reason[:1000]))), Lane.URGENT)

    def _answer(self, frame: Frame, lane: Lane) -> None:
        with self._lock:
            self._outcomes[frame.stream] = frame
        self.reply(frame, lane)

    def _forget(self) -> None:
        while self._outcomes and next(iter(self._outcomes)) <= self._highest - REMEMBERED:
            self._outcomes.popitem(last=False)

    def _enter(self) -> bool:
        with self._lock:
            if self._messages >= self.limits.max_messages:
                return False
            self._messages += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._messages -= 1

    @property
    def _busy(self) -> str:
        return f"{self.limits.max_messages} messages are not handled yet; send fewer at a time"


class Incoming:
    """One stream that is arriving.

    `take` runs on the thread that reads the connection and knows what is due; a sink that may make its sender wait is
    fed by `collect`, on a thread of its own.
    """

    def __init__(self, receiver: Receiver, stream: int, opening: Opening, meter: Meter) -> None:
        self._receiver = receiver
        self._stream = stream
        self._opening = opening
        self._meter = meter
        self._window = receiver.window
        self._direct: Sink | None = None
        """The sink that is fed on the thread that reads; others are fed by `collect`."""
        self._hasher = blake3()
        self._arrived: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over = False
        self._ready = opening.transfer is None
        """Whether it is known where the stream goes on."""
        self._prefix: bytes | None = None
        """Digest of what was there from earlier, until the first chunk has come."""
        self._due = 0
        """Sequence number of the next frame."""
        self._taken = 0
        """Chunks that the sink has."""
        self._limit = self._window
        self._bytes = 0
        self._ended = False
        self.heard = time.monotonic()

    def begin(self, sink: Sink) -> None:
        """Take the stream into a sink that only moves memory, on the thread that reads."""
        self._direct = sink

    def take(self, frame: Frame) -> None:
        """Check a frame and pass it on."""
        self.heard = time.monotonic()
        if frame.kind == Kind.CANCEL:
            self._give_up("cancelled by the sender")
        elif not self._ready:
            self._give_up("a frame came before it was known where the stream goes on")
        elif frame.kind == Kind.RESTART:
            if self._prefix is not None:
                self._prefix = None
                self._meter.skip(0)
                self._due = self._bytes = 0
                self._limit = self._window
                self._arrived.put(frame)
        elif frame.kind in (Kind.CHUNK, Kind.END):
            if frame.sequence > self._due:
                raise ProtocolError(f"stream {self._stream}: frame {frame.sequence} where {self._due} was due")
            if frame.sequence < self._due or self._ended:
                return  # a duplicate
            if problem := self._problem(frame):
                self._give_up(problem)
            else:
                self._advance(frame)

    def reply_position(self) -> None:
        """Tell the sender where to go on."""
        if self._ready:  # else it is told as soon as it is known
            content = wire.pack(wire.Position(self._limit, self._prefix))
            self._receiver.reply(make(Kind.POSITION, self._stream, self._due, content), Lane.URGENT)

    def check_idle(self) -> None:
        """Give the stream up if its sender could send and does not."""
        idle_s = self._receiver.limits.idle_s
        if self._prefix is not None:
            idle_s += self._bytes / COMPARED_BYTES_PER_S
        waits = self._ready and not self._ended and self._arrived.empty() and self._due < self._limit
        if waits and time.monotonic() - self.heard > idle_s:
            self._give_up(f"nothing arrived for {idle_s:g} s")

    def abandon(self) -> None:
        """The session is over."""
        self._give_up("the connection was lost")

    def collect(self, make_sink: Callable[[], Sink]) -> None:
        """Take the stream into a sink that may make its sender wait."""
        try:
            sink = make_sink()
        except Exception as error:
            return self._refuse(_why(error))
        try:
            if self._opening.transfer is not None:
                self._resume(sink)
            while not self._leave_to_reader(sink) and (frame := self._arrived.get()) is not None:
                if frame.kind == Kind.CHUNK:
                    self._store(sink, frame)
                elif frame.kind == Kind.END:
                    return self._finish(sink, frame)
                else:
                    sink.restart()
                    self._hasher, self._taken = blake3(), 0
            if self._direct is None:
                sink.suspend()
        except Exception as error:
            sink.abort()
            self._refuse(_why(error))
        return None

    def _leave_to_reader(self, sink: Sink) -> bool:
        """Have the thread that reads feed a sink that never waits, once it has all that came before."""
        with self._lock:
            if not sink.waits and self._opening.transfer is None and self._arrived.empty() and not self._over:
                self._direct = sink
            return self._direct is not None

    def _problem(self, frame: Frame) -> str | None:
        """Return what rule a frame breaks; its sender is at fault, not the way."""
        declared = self._opening.size
        if frame.kind == Kind.END:
            short = declared is not None and self._bytes != declared
            return f"ended at byte {self._bytes} of {declared}" if short else None
        if frame.sequence >= self._limit:
            return "more chunks than the window grants"
        most = self._receiver.limits.max_payload_bytes if declared is None else declared
        if self._bytes + len(frame.payload) > most or not frame.payload:
            return f"chunk {frame.sequence} goes beyond the size of {most} bytes"
        return None

    def _advance(self, frame: Frame) -> None:
        self._due += 1
        self._bytes += len(frame.payload) if frame.kind == Kind.CHUNK else 0
        self._ended = frame.kind == Kind.END
        self._prefix = None
        with self._lock:
            if self._direct is None:
                self._arrived.put(frame)
                return
        if self._ended:
            self._finish(self._direct, frame)
        else:
            self._store(self._direct, frame)

    def _resume(self, sink: Sink) -> None:
        """Tell the sender what is there from earlier."""
        self._hasher, self._taken = sink.resume()
        self._due = self._taken
        self._bytes = self._taken * CHUNK_BYTES
        self._meter.skip(self._bytes)
        self._limit = self._taken + self._window
        self._prefix = self._hasher.digest() if self._taken else None
        self.heard = time.monotonic()
        self._ready = True
        self.reply_position()

    def _store(self, sink: Sink, frame: Frame) -> None:
        chunk = memoryview(frame.payload)
        self._hasher.update(chunk)
        sink.write(chunk)
        self._meter.add(len(chunk))
        self._taken += 1
        if self._taken + self._window // 2 >= self._limit:
            self._limit = self._taken + self._window
            self._receiver.reply(make(Kind.CREDIT, self._stream, self._limit), Lane.URGENT)

    def _finish(self, sink: Sink, frame: Frame) -> None:
        """Hold the whole against its seal, and hand it over."""
        opening = self._opening
        try:
            end = wire.unpack(frame.payload, wire.End)
            if end.seal != wire.seal(opening.topic, opening.body, opening.kind, self._hasher.digest()):
                raise ProtocolError("the whole does not match its digest; send it again")
            payload = sink.finish()
        except Exception as error:
            sink.abort()
            return self._refuse(_why(error))
        with self._lock:
            over, self._over = self._over, True
        if not over:
            self._meter.report()
            self._receiver.deliver(self._stream, opening, payload)
        return None

    def _give_up(self, reason: str) -> None:
        """End the stream from outside of its collector."""
        self._refuse(reason)
        with self._lock:
            if self._direct is None:
                self._arrived.put(None)
                return
        self._direct.suspend()

    def _refuse(self, reason: str) -> None:
        with self._lock:
            over, self._over = self._over, True
        if not over:
            self._receiver.refuse(self._stream, reason)


def _whole(frame: Frame) -> wire.Message:
    message = wire.unpack(frame.payload, wire.Message)
    if wire.seal(message.topic, message.body, message.kind, blake3(message.payload).digest()) != message.seal:
        raise ProtocolError(f"message {message.topic!r} does not match its digest")
    return message


def _why(error: Exception) -> str:
    """Return what the sender is told."""
    if isinstance(error, OSError):
        return f"cannot be stored: {error.strerror}"
    if isinstance(error, FedbioError):
        return str(error)
    log.error("a consumer has failed", exc_info=error)
    return "its consumer has failed there"
