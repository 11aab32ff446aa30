"""One stream that is arriving: what is due, what its sender may send, and where its chunks go."""

from __future__ import annotations

__all__ = ["Incoming", "why_not"]

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from blake3 import blake3

from fedbio.errors import FedbioError, ProtocolError
from fedbio.transport import wire
from fedbio.transport.drivers import Lane
from fedbio.transport.frames import Frame, Kind, make
from fedbio.transport.metering import Meter
from fedbio.transport.objects import CHUNK_BYTES
from fedbio.transport.sinks import Opening, Sink

if TYPE_CHECKING:
    from fedbio.transport.receiver import Receiver

log = logging.getLogger(__name__)

COMPARED_BYTES_PER_S = 50 << 20
"""What a sender's disk yields at least, when the beginning of a file is read again to compare it with what is here."""


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
            return self._refuse(why_not(error))
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
            self._refuse(why_not(error))
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
            digest = self._hasher.digest()
            if end.seal != wire.seal(opening.topic, opening.body, opening.kind, digest):
                raise ProtocolError("the whole does not match its digest; send it again")
            payload = sink.finish()
        except Exception as error:
            sink.abort()
            return self._refuse(why_not(error))
        with self._lock:
            over, self._over = self._over, True
        if not over:
            self._meter.report()
            self._receiver.deliver(self._stream, opening, payload, self._bytes, digest)
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


def why_not(error: Exception) -> str:
    """Return what the sender is told."""
    if isinstance(error, OSError):
        return f"cannot be stored: {error.strerror}"
    if isinstance(error, FedbioError):
        return str(error)
    log.error("a consumer has failed", exc_info=error)
    return "its consumer has failed there"
