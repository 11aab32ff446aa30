"""Take in the messages of one peer: every size, number and digest is checked, memory is taken only after its cap."""

from __future__ import annotations

__all__ = ["Received", "Receiver"]

import collections
import functools
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from blake3 import blake3

from fedbio.errors import ProtocolError
from fedbio.transport import wire
from fedbio.transport.drivers import Lane
from fedbio.transport.frames import Frame, Kind
from fedbio.transport.limits import MAX_BODY_BYTES, Limits
from fedbio.transport.payloads import ReceivedPayload, Spool
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Received:
    """A message that has arrived whole."""

    peer: str
    """Who sent it: the name in the sender's certificate."""
    topic: str
    body: bytes
    payload: ReceivedPayload | None


class Reply(Protocol):
    """Write a small frame back to the peer."""

    def __call__(
        self, kind: Kind, stream: int, content: bytes = b"", sequence: int = 0, lane: Lane = Lane.URGENT
    ) -> None: ...


class Receiver:
    """The incoming half of a connection.

    `take` runs on the thread that reads the connection and only checks and passes on; what may wait for a disk runs on
    collectors, what may wait for anything on handlers.
    """

    def __init__(
        self,
        peer: str,
        limits: Limits,
        spool: Path,
        reply: Reply,
        deliver: Callable[[Received], None],
    ) -> None:
        self.peer = peer
        self._limits = limits
        self._spool = spool
        self._reply = reply
        self._deliver = deliver
        self._collectors = Workers(f"{peer}-collect", limits.max_messages)
        self._handlers = Workers(f"{peer}-handle", limits.max_messages)
        self._streams: dict[int, _Incoming] = {}
        self._last_stream = 0
        self._lock = threading.Lock()
        self._messages = 0
        self._memory = 0
        self._freed: collections.deque[int] = collections.deque()

    def take(self, frame: Frame) -> None:
        """Take one frame in; raise `ProtocolError` if the peer broke the rules."""
        if frame.kind in (Kind.MESSAGE, Kind.OPEN):
            if frame.stream <= self._last_stream:
                raise ProtocolError(f"stream {frame.stream} opened after stream {self._last_stream}")
            self._last_stream = frame.stream
            if frame.kind == Kind.MESSAGE:
                self._take_message(frame)
            else:
                self._take_open(frame)
        elif frame.kind in (Kind.CHUNK, Kind.END, Kind.CANCEL):
            if frame.stream > self._last_stream:
                raise ProtocolError(f"{Kind(frame.kind).name} of stream {frame.stream}, which was never opened")
            # a stream that was rejected here may have chunks under way: they are let go
            if incoming := self._streams.get(frame.stream):
                incoming.take(frame)

    def close(self) -> None:
        """Give up what has not arrived whole."""
        for incoming in list(self._streams.values()):
            incoming.abandon()
        # what was accepted is still handled
        self._collectors.close()
        self._handlers.close()

    def _take_message(self, frame: Frame) -> None:
        message = wire.unpack(frame.payload, wire.Message)
        content = message.payload
        digest = None if content is None else blake3(content).digest()
        if wire.seal(message.topic, message.body, digest) != message.digest:
            raise ProtocolError(f"message {message.topic!r} does not match its digest")
        if not self._enter():
            self._reject(frame.stream, self._busy)
            return
        payload = None if content is None else ReceivedPayload(memoryview(content))
        self._hand_over(frame.stream, Received(self.peer, message.topic, message.body, payload))

    def _take_open(self, frame: Frame) -> None:
        opening = wire.unpack(frame.payload, wire.Open)
        size = opening.payload_bytes or 0
        if opening.body_bytes > MAX_BODY_BYTES:
            self._reject(frame.stream, f"a body of {opening.body_bytes} bytes, at most {MAX_BODY_BYTES} are allowed")
        elif size > self._limits.max_payload_bytes:
            self._reject(
                frame.stream, f"a payload of {size} bytes, at most {self._limits.max_payload_bytes} are allowed"
            )
        elif not self._enter():
            self._reject(frame.stream, self._busy)
        else:
            incoming = _Incoming(frame.stream, opening, self._limits)
            self._streams[frame.stream] = incoming
            self._collectors.submit(lambda: self._collect(incoming))

    def _collect(self, incoming: _Incoming) -> None:
        """Bring one stream in, on a thread of its own."""
        grant = functools.partial(self._reply, Kind.CREDIT, incoming.stream, b"")
        try:
            received = incoming.collect(self.peer, self._store(incoming.opening.payload_bytes), grant)
        except (OSError, ProtocolError, _GivenUp) as error:
            reason = f"cannot be stored: {error.strerror}" if isinstance(error, OSError) else str(error)
            self._reject(incoming.stream, reason)
            self._leave()
        else:
            self._hand_over(incoming.stream, received)
        finally:
            self._streams.pop(incoming.stream, None)

    def _store(self, size: int | None) -> _Store | None:
        """Take memory or disk for a payload of a size that was checked."""
        if size is None:
            return None
        with self._lock:
            while self._freed:
                self._memory -= self._freed.pop()
            fits = self._memory + size <= self._limits.memory_bytes
            if fits:
                self._memory += size
        return _MemoryStore(size, self._freed) if fits else _SpoolStore(Spool(self._spool, size))

    def _hand_over(self, stream: int, received: Received) -> None:
        def handle() -> None:
            try:
                self._deliver(received)
            finally:
                self._leave()

        self._handlers.submit(handle)
        # a reply is often not far: let the two leave together
        self._reply(Kind.ACCEPTED, stream, lane=Lane.LAZY)

    def _reject(self, stream: int, reason: str) -> None:
        log.info("message rejected peer=%s stream=%d reason=%s", self.peer, stream, reason)
        self._reply(Kind.REJECTED, stream, wire.pack(wire.Refusal(reason[:1000])))

    def _enter(self) -> bool:
        with self._lock:
            if self._messages >= self._limits.max_messages:
                return False
            self._messages += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._messages -= 1

    @property
    def _busy(self) -> str:
        return f"{self._limits.max_messages} messages are not handled yet; send fewer at a time"


class _GivenUp(Exception):
    """A stream that will not come to its end."""


class _Incoming:
    """One stream: `take` checks each frame as it is read, `collect` takes them in at its own pace."""

    def __init__(self, stream: int, opening: wire.Open, limits: Limits) -> None:
        self.stream = stream
        self.opening = opening
        self._idle_s = limits.idle_s
        self._grant = max(1, limits.window_chunks // 2)
        self._credit = limits.window_chunks
        self._next = 0
        self._missing = opening.body_bytes + (opening.payload_bytes or 0)
        self._arrived: queue.SimpleQueue[Frame | str] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def take(self, frame: Frame) -> None:
        if frame.kind == Kind.CANCEL:
            self._arrived.put("cancelled by the sender")
            return
        if frame.sequence < self._next:
            return  # a duplicate
        if frame.sequence > self._next:
            raise ProtocolError(f"stream {self.stream}: frame {frame.sequence} where {self._next} was due")
        self._next += 1
        if frame.kind == Kind.CHUNK:
            with self._lock:
                self._credit -= 1
                overdrawn = self._credit < 0
            self._missing -= len(frame.payload)
            if overdrawn:
                raise ProtocolError(f"stream {self.stream}: more chunks than the window grants")
            if self._missing < 0 or not frame.payload:
                raise ProtocolError(f"stream {self.stream}: chunk {frame.sequence} goes beyond the size declared")
        elif self._missing:
            raise ProtocolError(f"stream {self.stream}: ended {self._missing} bytes early")
        self._arrived.put(frame)

    def abandon(self) -> None:
        self._arrived.put("the connection was lost")

    def collect(self, peer: str, store: _Store | None, grant: Callable[[int], None]) -> Received:
        """Take chunks in until the end, then hold the whole against its digest."""
        body = bytearray()
        hasher = blake3()
        taken = 0
        while (frame := self._wait()).kind == Kind.CHUNK:
            chunk = frame.payload
            if len(body) < self.opening.body_bytes:
                split = self.opening.body_bytes - len(body)
                body += chunk[:split]
                chunk = chunk[split:]
            if store is not None and chunk:
                hasher.update(chunk)
                store.write(chunk)
            taken += 1
            if taken == self._grant:
                with self._lock:
                    self._credit += taken
                grant(taken)
                taken = 0
        digest = None if store is None else hasher.digest()
        if wire.seal(self.opening.topic, body, digest) != frame.payload:
            raise ProtocolError("the whole does not match its digest; send it again")
        payload = None if store is None else store.finish()
        return Received(peer, self.opening.topic, bytes(body), payload)

    def _wait(self) -> Frame:
        try:
            frame = self._arrived.get(timeout=self._idle_s)
        except queue.Empty:
            raise _GivenUp(f"nothing arrived for {self._idle_s:g} s") from None
        if isinstance(frame, str):
            raise _GivenUp(frame)
        return frame


class _Store(Protocol):
    """Where a payload goes while it arrives."""

    def write(self, chunk: memoryview) -> None: ...

    def finish(self) -> ReceivedPayload: ...


class _MemoryStore:
    """One buffer of the declared size; its pages are taken as chunks fill them."""

    def __init__(self, size: int, freed: collections.deque[int]) -> None:
        array = np.empty(size, np.uint8)
        # counted as free when the last view of it is gone, on whatever thread that happens
        weakref.finalize(array, freed.append, size)
        self._view = array.data
        self._filled = 0

    def write(self, chunk: memoryview) -> None:
        self._view[self._filled : self._filled + len(chunk)] = chunk
        self._filled += len(chunk)

    def finish(self) -> ReceivedPayload:
        return ReceivedPayload(self._view.toreadonly())


class _SpoolStore:
    """A nameless file in the spool folder."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def write(self, chunk: memoryview) -> None:
        self._spool.write(chunk)

    def finish(self) -> ReceivedPayload:
        return ReceivedPayload(self._spool.map(), self._spool)
