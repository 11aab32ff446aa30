"""Carry the messages of many streams over one connection: numbered, windowed, checked, each acknowledged.

A message of up to 64 KiB is one MESSAGE frame. A larger one is OPEN, then CHUNK 0, 1, 2, ..., then END with the seal
over the whole. The receiver grants a window of chunks and adds CREDIT as it takes them in, so that neither end holds
more than a window; it answers ACCEPTED or REJECTED. Streams are numbered by the end that opens them, and numbers only
grow.
"""

from __future__ import annotations

__all__ = ["Received", "SendReceipt", "Streams"]

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedbio.errors import PeerUnreachable, ProtocolError, TransportError
from fedbio.transport import wire
from fedbio.transport.drivers import Connection, ConnectionClosed, Lane
from fedbio.transport.frames import Frame, Kind, decode, encode
from fedbio.transport.incoming import Received, Receiver
from fedbio.transport.limits import MAX_BODY_BYTES, Limits
from fedbio.transport.payloads import Payload

INLINE_BYTES = 64 << 10
"""A message up to this size travels in one frame."""


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """What a message cost, once its receiver has acknowledged it."""

    bytes: int
    """Body and payload."""
    seconds: float
    """From `send` to the acknowledgement."""


class _Outgoing:
    """A message under way: how many chunks may still leave, and how it ended."""

    def __init__(self, window: int) -> None:
        self._credit = window
        self._changed = threading.Condition()
        self._outcome: TransportError | bool | None = None

    def grant(self, chunks: int) -> None:
        with self._changed:
            self._credit += chunks
            self._changed.notify()

    def finish(self, outcome: TransportError | bool) -> None:
        with self._changed:
            if self._outcome is None:
                self._outcome = outcome
            self._changed.notify()

    def spend(self, deadline: float | None) -> None:
        """Wait until one more chunk may leave."""
        self._wait(lambda: self._credit > 0, deadline)
        self._credit -= 1

    def wait(self, deadline: float | None) -> None:
        """Wait until the receiver has acknowledged the whole."""
        self._wait(lambda: False, deadline)

    def _wait(self, ready: Callable[[], bool], deadline: float | None) -> None:
        with self._changed:
            while self._outcome is None and not ready():
                left = None if deadline is None else deadline - time.monotonic()
                if not self._changed.wait(left):
                    raise PeerUnreachable("no acknowledgement within the time given")
            if isinstance(self._outcome, TransportError):
                raise self._outcome


class Streams:
    """The messages of one connection, both ways.

    Parameters
    ----------
    connection : Connection
        After its handshake; from here on only this object reads it.
    peer : str
        The other end's name.
    peer_window : int
        Chunks of a stream that the other end takes unasked.
    deliver : callable
        Called with each message that has arrived whole, on threads of this connection: no peer waits for another's.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        peer: str,
        peer_window: int,
        limits: Limits,
        spool: Path,
        deliver: Callable[[Received], None],
    ) -> None:
        self.peer = peer
        self.connection = connection
        self.frames_heard = 0
        self._peer_window = peer_window
        self._outgoing: dict[int, _Outgoing] = {}
        self._lock = threading.Lock()
        self._last_stream = 0
        self._sign = threading.Event()
        self._reason: str | None = None
        self.announced = threading.Event()
        """Set once the peer's arrival is known to the owner: no message is delivered before."""
        self._deliver = deliver
        self._receiver = Receiver(peer, limits, spool, self._reply, self._deliver_announced)

    def run(self) -> str:
        """Read until the connection ends; return why it ended.

        A malformed frame ends it: after one nobody knows what the next bytes mean.
        """
        try:
            while True:
                frame = decode(self.connection.read())
                self.frames_heard += 1
                self._sign.set()
                self._take(frame)
        except ConnectionClosed as closed:
            self._end(str(closed))
        except ProtocolError as error:
            self._end(f"protocol error: {error}")
        return self._reason or ""

    def close(self, reason: str) -> None:
        """Let what was written leave and end the connection; `run` returns soon after."""
        self._end(reason)

    def abort(self, reason: str) -> None:
        """End the connection now."""
        self._end(reason)
        self.connection.abort()

    def shows_life(self, within_s: float) -> bool:
        """Ask for a sign of life and return whether one came in time."""
        self._sign.clear()
        self.ping()
        return self._sign.wait(within_s) and self._reason is None

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._reply(Kind.PING, 0)

    def send(self, topic: str, body: bytes, payload: Payload | None, timeout_s: float | None) -> SendReceipt:
        """Send one message and wait until the receiver has acknowledged the whole."""
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"a body of {len(body)} bytes; send more than {MAX_BODY_BYTES} as a payload")
        started = time.monotonic()
        deadline = None if timeout_s is None else started + timeout_s
        size = len(body) + (payload.size if payload else 0)
        outgoing = _Outgoing(self._peer_window)
        stream = 0
        try:
            if size <= INLINE_BYTES:
                stream = self._begin(outgoing, Kind.MESSAGE, _whole(topic, body, payload))
            else:
                opening = wire.Open(topic, len(body), payload.size if payload else None)
                stream = self._begin(outgoing, Kind.OPEN, wire.pack(opening))
                self._send_chunks(stream, outgoing, topic, body, payload, deadline)
            outgoing.wait(deadline)
        except PeerUnreachable as error:
            raise PeerUnreachable(f"{self.peer}: {topic} was not delivered: {error}") from error
        except TransportError as error:
            raise TransportError(f"{self.peer}: {topic} was {error}") from error
        finally:
            with self._lock:
                self._outgoing.pop(stream, None)
        return SendReceipt(size, time.monotonic() - started)

    def _deliver_announced(self, message: Received) -> None:
        self.announced.wait()
        self._deliver(message)

    def _begin(self, outgoing: _Outgoing, kind: Kind, content: bytes) -> int:
        # numbers must reach the other end in order, so the frame leaves under the lock that gives the number
        with self._lock:
            self._last_stream += 1
            self._outgoing[self._last_stream] = outgoing
            self.connection.write(encode(kind, self._last_stream, 0, content))
            return self._last_stream

    def _send_chunks(
        self,
        stream: int,
        outgoing: _Outgoing,
        topic: str,
        body: bytes,
        payload: Payload | None,
        deadline: float | None,
    ) -> None:
        sequence = 0
        try:
            if body:
                outgoing.spend(deadline)
                self.connection.write(encode(Kind.CHUNK, stream, sequence, body), Lane.BULK)
                sequence += 1
            for chunk in payload.digested_chunks() if payload else ():
                outgoing.spend(deadline)
                self.connection.write(encode(Kind.CHUNK, stream, sequence, chunk), Lane.BULK)
                sequence += 1
            seal = wire.seal(topic, body, payload.digest() if payload else None)
            self.connection.write(encode(Kind.END, stream, sequence, seal), Lane.BULK)
        except BaseException:
            self._reply(Kind.CANCEL, stream)
            raise

    def _reply(
        self, kind: Kind, stream: int, content: bytes = b"", sequence: int = 0, lane: Lane = Lane.URGENT
    ) -> None:
        """Write a small frame; if the connection has ended, `run` says so."""
        with contextlib.suppress(ConnectionClosed):
            self.connection.write(encode(kind, stream, sequence, content), lane)

    def _take(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == Kind.PING:
            self._reply(Kind.PONG, 0)
        elif kind in (Kind.CREDIT, Kind.ACCEPTED, Kind.REJECTED):
            self._take_answer(frame)
        elif kind in (Kind.HELLO, Kind.WELCOME, Kind.REFUSED):
            raise ProtocolError(f"a second handshake ({Kind(kind).name})")
        else:
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
        elif frame.kind == Kind.ACCEPTED:
            outgoing.finish(True)
        else:
            refusal = wire.unpack(frame.payload, wire.Refusal)
            outgoing.finish(TransportError(f"not accepted: {refusal.reason}"))

    def _end(self, reason: str) -> None:
        # after this no message can begin, so that none is missed below
        self.connection.close()
        with self._lock:
            self._reason = self._reason or reason
            waiting = list(self._outgoing.values())
        for outgoing in waiting:
            outgoing.finish(PeerUnreachable(f"connection lost: {self._reason}"))
        self._receiver.close()
        self._sign.set()
        self.announced.set()


def _whole(topic: str, body: bytes, payload: Payload | None) -> bytes:
    content = None if payload is None else b"".join(payload.digested_chunks())
    seal = wire.seal(topic, body, payload.digest() if payload else None)
    return wire.pack(wire.Message(topic, body, content, seal))
