"""Take in the streams of one peer: every size, number and digest is checked, memory is taken only after its cap."""

from __future__ import annotations

__all__ = ["Agreed", "Received", "Receiver", "Room", "SinkFactory"]

import collections
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from fedbio.errors import ProtocolError, TransportError
from fedbio.transport import wire
from fedbio.transport.drivers import Lane
from fedbio.transport.frames import Frame, Kind, make
from fedbio.transport.incoming import Incoming, why_not
from fedbio.transport.limits import MAX_BODY_BYTES, Limits
from fedbio.transport.metering import Meter, OnProgress
from fedbio.transport.sinks import MemorySink, Opening, Sink, SpooledFileSink, SpoolSink, TensorSink
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Streams whose outcome is remembered, for a sender who has missed the answer."""


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
    size: int = 0
    """Bytes of the payload as it travelled."""
    digest: bytes = b""
    """BLAKE3 of the payload as it travelled; empty if none was sent, or if it did not come over a network."""


SinkFactory = Callable[[Opening], Sink]

Agreed = Callable[[Opening], Collection[str]]
"""Returns the quantization schemes in which a model may come."""

Room = Callable[[Opening], int]
"""Returns how many bytes a payload may have."""

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
        room: Room | None = None,
    ) -> None:
        self.peer = peer
        self.limits = limits
        self.window = limits.window_chunks
        self._spool = spool
        self._sinks = sinks
        self.reply = reply
        self._deliver = deliver
        self._on_progress = on_progress
        self._schemes, self._room = schemes, room
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
            return self._take_message(stream, *_whole(frame))
        self._take_open(stream, wire.unpack(frame.payload, wire.Open))
        if frame.sequence and (incoming := self._streams.get(stream)):
            incoming.reply_position()
        return None

    def _remember(self, stream: int) -> None:
        self._highest = max(self._highest, stream)
        with self._lock:
            self._outcomes[stream] = None
            self._forget()

    def _take_message(self, stream: int, message: wire.Message, digest: bytes) -> None:
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
                self._reject(stream, why_not(error))
                return self._leave()
            size = len(message.payload)
            return self._hand_over(stream, Received(self.peer, message.topic, message.body, payload, size, digest))

        if message.topic in self._sinks:
            return self._collectors.submit(collect)
        return collect()

    def _take_open(self, stream: int, content: wire.Open) -> None:
        self._remember(stream)
        size = content.size or 0
        if len(content.body) > MAX_BODY_BYTES:
            self._reject(stream, f"a body of {len(content.body)} bytes, at most {MAX_BODY_BYTES} are allowed")
        elif size > self.limits.max_payload_bytes:
            self._reject(stream, _too_large(size, self.limits.max_payload_bytes))
        elif not self._enter():
            self._reject(stream, self._busy)
        else:
            opening = Opening(self.peer, content.topic, content.body, content.kind, content.size, content.transfer)
            meter = Meter(self._on_progress, self.peer, opening.topic, outgoing=False, total=opening.size)
            incoming = Incoming(self, stream, opening, meter)
            self._streams[stream] = incoming
            # whether there is room is asked where it may take a moment
            quick = content.topic not in self._sinks and self._room is None
            if quick and (sink := self._quick_sink(opening)) is not None:
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
        most = self.limits.max_payload_bytes
        if self._room is not None:
            most = min(most, self._room(opening))
            if opening.size is not None and opening.size > most:
                raise TransportError(_too_large(opening.size, most))
        if opening.kind == "quantized":
            agreed = None if self._schemes is None else self._schemes(opening)
            return TensorSink(lambda size: self._store(opening, size, most), agreed)
        if opening.kind == "file" and opening.transfer is not None:
            return SpooledFileSink(self._spool, opening, self.limits.max_partial_files)
        return self._store(opening, opening.size, most)

    def _store(self, opening: Opening, size: int | None, most: int) -> Sink:
        if size is not None and size > most:
            raise TransportError(_too_large(size, most))
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

    def deliver(self, stream: int, opening: Opening, payload: Any, size: int, digest: bytes) -> None:
        """A stream has come whole."""
        self._hand_over(stream, Received(self.peer, opening.topic, opening.body, payload, size, digest))
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


def _whole(frame: Frame) -> tuple[wire.Message, bytes]:
    """Return a message of one frame, and the digest of its payload."""
    message = wire.unpack(frame.payload, wire.Message)
    digest = blake3(message.payload).digest()
    if wire.seal(message.topic, message.body, message.kind, digest) != message.seal:
        raise ProtocolError(f"message {message.topic!r} does not match its digest")
    return message, digest


def _too_large(size: int, most: int) -> str:
    return f"a payload of {size} bytes, at most {most} are allowed"
