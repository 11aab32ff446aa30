"""The streams between two processes, over one connection after the other: a break is not the end of them.

A message of up to 64 KiB is one MESSAGE frame. A larger one is OPEN, then CHUNK 0, 1, 2, ..., then END with the seal
over the whole. The receiver grants chunks below a sequence number with CREDIT as it takes them in, so that neither end
holds more than a window; it answers ACCEPTED or REJECTED. Streams are numbered by the end that opens them.

After a break each end sends the openings of its unfinished streams again, and the receiver says what became of them:
ACCEPTED or REJECTED if they are finished, else POSITION with the chunk that is due.
"""

from __future__ import annotations

__all__ = ["Session"]

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from fedbio.errors import PeerUnreachable, ProtocolError, TransportError
from fedbio.transport import wire
from fedbio.transport.drivers import Connection, ConnectionClosed, Lane
from fedbio.transport.frames import MAX_PAYLOAD_BYTES, Frame, Kind, make
from fedbio.transport.limits import MAX_BODY_BYTES, Limits
from fedbio.transport.metering import Meter, OnProgress
from fedbio.transport.outgoing import Outgoing, SendReceipt
from fedbio.transport.payloads import Payload, Reader
from fedbio.transport.receiver import Agreed, Received, Receiver, Room, SinkFactory
from fedbio.transport.wire import MAX_TOPIC

log = logging.getLogger(__name__)

INLINE_BYTES = 64 << 10
"""A message up to this size travels in one frame."""

MOST_FRUITLESS = 8
"""Connections in a row that an error may end before anything has moved; the session is given up then."""

MOVING = (Kind.CHUNK, Kind.END, Kind.CREDIT, Kind.ACCEPTED, Kind.REJECTED)


class _Cancelled(TransportError):
    """The sender does not want it to arrive any more."""


class Session:
    """The messages between this process and one other.

    Parameters
    ----------
    peer : str
        The other end's name.
    deliver : callable
        Called with each message that has arrived whole, on threads of this session: no peer waits for another's.
    """

    def __init__(
        self,
        peer: str,
        *,
        limits: Limits,
        spool: Path,
        sinks: Mapping[str, SinkFactory],
        deliver: Callable[[Received], None],
        on_progress: OnProgress | None = None,
        schemes: Agreed | None = None,
        room: Room | None = None,
    ) -> None:
        self.peer = peer
        self.id = os.urandom(16)
        """The same at both ends; the server chooses it."""
        self.frames_heard = 0
        self.detached_since = time.monotonic()
        self.announced = threading.Event()
        """Set once the peer's arrival is known to the owner: no message is delivered before."""
        self._on_progress = on_progress
        self._window = 1
        self._fruitless = 0
        """Connections in a row that an error ended before anything had moved."""
        self._connection: Connection | None = None
        self._outgoing: dict[int, Outgoing] = {}
        self._last_stream = 0
        self._lock = threading.Lock()
        self._sign = threading.Event()
        """Set by the answer to the last question, see `shows_life`, and by the end of a connection."""
        self._asked = self._answered = 0
        self._over: str | None = None
        self._deliver = deliver
        self._receiver = Receiver(
            peer, limits, spool, sinks, self._reply, self._deliver_announced, on_progress, schemes, room
        )

    @property
    def over(self) -> str | None:
        """Why the session has ended; None while it lives."""
        return self._over

    @property
    def connection(self) -> Connection | None:
        """The connection that carries the session now."""
        return self._connection

    def carry(self, connection: Connection, window: int) -> str:
        """Go on over a new connection until that ends; return why it did. One connection at a time.

        Parameters
        ----------
        connection : Connection
            After its handshake; from here on only this object reads it.
        window : int
            Chunks of a stream that the other end takes unasked; the smaller of this and our own holds both ways.
        """
        reason = ""
        try:
            self._attach(connection, window)
            while True:
                frame = connection.read()
                self.frames_heard += 1
                if frame.kind == Kind.BYE:
                    reason = "closed by the peer"
                    self.end(reason)
                    connection.abort()  # nobody listens there any more
                    break
                self._take(frame)
                if frame.kind in MOVING:
                    self._fruitless = 0
                del frame  # its memory, still in the processor's cache, is the next one's
        except ConnectionClosed as closed:
            reason = str(closed)
        except ProtocolError as error:
            # after a malformed frame nobody knows what the next bytes mean
            reason = f"protocol error: {error}"
            self._fruitless += 1
            if self._fruitless >= MOST_FRUITLESS:
                self.end(reason)  # the two ends do not mean the same session any more
        except Exception as error:
            # a bug of ours; the session is given up, for the same frame would come again
            log.exception("session failed peer=%s", self.peer)
            reason = f"internal error: {error}"
            self.end(reason)
        finally:
            connection.close()
            self._detach()
        return self._over or reason

    def close(self, reason: str) -> None:
        """Say goodbye, let what was written leave, and end."""
        connection = self._connection
        self._reply(make(Kind.BYE), Lane.URGENT)
        self.end(reason)
        if connection is not None:
            connection.close()

    def end(self, reason: str) -> None:
        """Give up whatever is under way, both ways; nothing can begin after this."""
        with self._lock:
            self._over = self._over or reason
            waiting = list(self._outgoing.values())
        for outgoing in waiting:
            outgoing.finish(PeerUnreachable(f"connection lost: {self._over}"))
        self._receiver.close()
        self._sign.set()
        self.announced.set()

    def shows_life(self, within_s: float) -> bool:
        """Ask for a sign of life and return whether one came in time."""
        while (connection := self._connection) is not None and self._over is None:
            alive = self._answers(within_s)
            if self._connection is connection:
                return alive
        return False

    def _answers(self, within_s: float) -> bool:
        """Whether the peer answers a question, or goes on sending: what was under way when it died does neither."""
        with self._lock:
            self._asked += 1
            number = self._asked
            self._sign.clear()
        self._reply(make(Kind.PING, 0, number), Lane.URGENT)
        self._sign.wait(within_s / 2)
        heard = self.frames_heard
        return self._answered >= number or self._sign.wait(within_s / 2) or self.frames_heard > heard

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._reply(make(Kind.PING), Lane.URGENT)

    def sweep(self) -> None:
        """Give up streams on which nothing moves although it could."""
        if self._connection is not None:
            self._receiver.sweep()

    def send(self, topic: str, body: bytes, payload: Payload | None, timeout_s: float | None) -> SendReceipt:
        """Send one message and wait until the receiver has acknowledged the whole."""
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"a body of {len(body)} bytes; send more than {MAX_BODY_BYTES} as a payload")
        if not 1 <= len(topic) <= MAX_TOPIC:
            raise ValueError(f"a topic of {len(topic)} characters; expected 1 to {MAX_TOPIC}")
        started = time.monotonic()
        deadline = None if timeout_s is None else started + timeout_s
        with contextlib.ExitStack() as stack:
            reader = None if payload is None else stack.enter_context(payload.read())
            small = payload is not None and payload.size is not None and len(body) + payload.size <= INLINE_BYTES
            size = len(body) + ((payload.size or 0) if payload else 0)
            stream = 0
            try:
                if payload is None or reader is None or small:
                    content = wire.pack(_whole(topic, body, payload, reader))
                    stream, outgoing = self._begin(Kind.MESSAGE, content)
                    outgoing.run(iter(()), None, deadline)
                else:
                    transfer = payload.transfer()
                    opening = wire.Open(topic, body, payload.kind, payload.size, transfer)
                    stream, outgoing = self._begin(Kind.OPEN, wire.pack(opening), resumable=transfer is not None)
                    meter = Meter(self._on_progress, self.peer, topic, outgoing=True, total=payload.size)
                    frames = _frames(stream, opening, reader, meter)
                    stack.enter_context(payload.watched(lambda: outgoing.finish(_Cancelled("cancelled here"))))
                    outgoing.run(frames, reader, deadline, waits=payload.waits)
                    size = len(body) + reader.bytes
                    meter.report()
            except PeerUnreachable as error:
                self._forget(stream, cancel=True)
                raise PeerUnreachable(f"{self.peer}: {topic} was not delivered: {error}") from error
            except TransportError as error:
                self._forget(stream, cancel=isinstance(error, _Cancelled))
                raise TransportError(f"{self.peer}: {topic} was {error}") from error
            except BaseException:
                self._forget(stream, cancel=True)
                raise
            finally:
                self._forget(stream)
        return SendReceipt(size, time.monotonic() - started)

    def _attach(self, connection: Connection, window: int) -> None:
        connection.allowed_bytes = MAX_PAYLOAD_BYTES
        self._receiver.restart_clocks()
        with self._lock:
            if self._over is not None:
                raise ConnectionClosed(self._over)
            self._window = self._receiver.agree(window)
            self._connection = connection
            for stream in sorted(self._outgoing):
                connection.write(self._outgoing[stream].opening)
                self._outgoing[stream].attach(connection, self._window)

    def _detach(self) -> None:
        with self._lock:
            self._connection = None
            self.detached_since = time.monotonic()
            for outgoing in self._outgoing.values():
                outgoing.detach()
        self._sign.set()

    def _begin(self, kind: Kind, content: bytes, *, resumable: bool = False) -> tuple[int, Outgoing]:
        # numbers reach the other end in order: the frame leaves under the lock that gives the number
        with self._lock:
            if self._over is not None:
                raise PeerUnreachable(f"connection lost: {self._over}")
            self._last_stream += 1
            stream = self._last_stream
            outgoing = Outgoing(make(kind, stream, 0, content), resumable=resumable)
            self._outgoing[stream] = outgoing
            if self._connection is not None:
                with contextlib.suppress(ConnectionClosed):
                    self._connection.write(outgoing.opening)
                    outgoing.attach(self._connection, self._window)
            return stream, outgoing

    def _forget(self, stream: int, *, cancel: bool = False) -> None:
        with self._lock:
            known = self._outgoing.pop(stream, None)
        if known and cancel:
            # chunks that it overtakes are of a stream that is over
            self._reply(make(Kind.CANCEL, stream), Lane.URGENT)

    def _reply(self, frame: Frame, lane: Lane) -> None:
        """Write a small frame; if there is no connection, the next one begins by telling what matters."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(ConnectionClosed):
                connection.write(frame, lane)

    def _deliver_announced(self, message: Received) -> None:
        self.announced.wait()
        self._deliver(message)

    def _take(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == Kind.PING:
            self._reply(make(Kind.PONG, 0, frame.sequence), Lane.URGENT)
        elif kind == Kind.PONG:
            self._answered = max(self._answered, min(frame.sequence, self._asked))
            if frame.sequence == self._asked:
                self._sign.set()
        elif kind in (Kind.CREDIT, Kind.ACCEPTED, Kind.REJECTED, Kind.POSITION):
            self._take_answer(frame)
        elif kind in (Kind.HELLO, Kind.WELCOME, Kind.REFUSED):
            raise ProtocolError(f"a second handshake ({Kind(kind).name})")
        elif kind in (Kind.MESSAGE, Kind.OPEN, Kind.CHUNK, Kind.END, Kind.CANCEL, Kind.RESTART):
            self._receiver.take(frame)

    def _take_answer(self, frame: Frame) -> None:
        with self._lock:
            if frame.stream > self._last_stream:
                raise ProtocolError(f"an answer about stream {frame.stream}, which was never opened")
            outgoing = self._outgoing.get(frame.stream)
        if outgoing is None:
            return  # given up here while the answer was under way
        if frame.kind == Kind.CREDIT:
            outgoing.grant(frame.sequence)
        elif frame.kind == Kind.POSITION:
            position = wire.unpack(frame.payload, wire.Position)
            outgoing.position(frame.sequence, position.limit, position.prefix)
        elif frame.kind == Kind.ACCEPTED:
            outgoing.finish(True)
        else:
            refusal = wire.unpack(frame.payload, wire.Refusal)
            outgoing.finish(TransportError(f"not accepted: {refusal.reason}"))


def _whole(topic: str, body: bytes, payload: Payload | None, reader: Reader | None) -> wire.Message:
    content = b"" if reader is None else b"".join(chunk.view for chunk in reader)
    if payload is not None and len(content) != payload.size:
        raise ValueError(f"a payload of {len(content)} bytes, declared as {payload.size}")
    kind = "none" if payload is None else payload.kind
    digest = blake3(content).digest()
    return wire.Message(topic, body, kind, content, wire.seal(topic, body, kind, digest))


def _frames(stream: int, opening: wire.Open, reader: Reader, meter: Meter) -> Iterator[Frame]:
    """Yield a payload's chunks, and the end with the seal over the whole."""
    for chunk in reader:
        if reader.bytes - len(chunk.view) == reader.skipped:
            meter.skip(reader.skipped)
        meter.add(len(chunk.view))
        yield Frame(Kind.CHUNK, stream, reader.position - 1, chunk.view, chunk.crc)
    seal = wire.seal(opening.topic, opening.body, opening.kind, reader.finish())
    yield make(Kind.END, stream, reader.position, wire.pack(wire.End(reader.bytes, seal)))
