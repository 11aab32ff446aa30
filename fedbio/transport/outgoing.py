"""Send one message: at most a window ahead of its receiver, and again from its last verified chunk after a break."""

from __future__ import annotations

__all__ = ["Outgoing", "SendReceipt"]

import collections
import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fedbio.errors import PeerUnreachable, ProtocolError, TransportError
from fedbio.transport.drivers import Connection, ConnectionClosed, Lane
from fedbio.transport.frames import Frame, Kind, make
from fedbio.transport.payloads import Reader


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """What a message cost, once its receiver has acknowledged it."""

    bytes: int
    """Body and payload."""
    seconds: float
    """From `send` to the acknowledgement."""


class Outgoing:
    """One message under way.

    Frames are made on the thread of the sender, or, if making them never waits and the connection pulls, on the thread
    that sends them. Those that the receiver has not confirmed are kept, one window at
    most; `position` moves the cursor back among them after a break.

    Parameters
    ----------
    opening : Frame
        MESSAGE or OPEN; sent again on each new connection until the outcome is known.
    """

    def __init__(self, opening: Frame, *, resumable: bool = False) -> None:
        self._opening = opening
        self._window = 0
        self._limit = 0
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        # a file may be at the receiver already in part: it is asked first
        self._resumable = resumable
        self._positioned = False
        self._asked = False
        self._prefix: bytes | None = None
        self._restarting = False
        self._kept: collections.deque[Frame] = collections.deque()
        self._first = 0
        """Sequence number of the oldest frame that is kept."""
        self._cursor = 0
        """Sequence number of the next frame to send."""
        self._ended = False
        self._outcome: TransportError | bool | None = None
        self._chunks: Iterator[Frame] | None = None
        """What a connection may pull."""
        self._offered_to: Connection | None = None
        self._making = threading.Lock()
        """Held by the thread that pulls: it may be that of the connection before, for a moment."""
        self._failure: BaseException | None = None

    # called by the connection's reader

    @property
    def opening(self) -> Frame:
        """What the next connection begins with."""
        return self._opening._replace(sequence=int(self._asked))

    def attach(self, connection: Connection, window: int) -> None:
        """The opening was written to a new connection, whose other end takes `window` chunks unasked."""
        with self._changed:
            self._connection = connection
            if not self._asked:
                self._window = self._limit = window
            # only the first time does the receiver surely know nothing of the stream
            self._positioned = not self._asked and not self._resumable
            self._asked = True
            self._offer()
            self._changed.notify_all()

    def detach(self) -> None:
        """There is no connection now."""
        with self._changed:
            self._connection = None

    def grant(self, limit: int) -> None:
        """The receiver takes chunks below `limit`, and so has all those a window before."""
        with self._changed:
            if limit > self._cursor + self._window:
                raise ProtocolError(f"grants chunks below {limit}, when {self._cursor} have left")
            self._limit = max(self._limit, limit)
            self._forget(limit - self._window)
            self._offer()
            self._changed.notify_all()

    def position(self, due: int, limit: int, prefix: bytes | None) -> None:
        """The receiver goes on at chunk `due`."""
        with self._changed:
            if self._opening.kind != Kind.OPEN:
                raise ProtocolError("goes on in a message that has no chunks")
            if not due <= limit <= due + self._window:
                raise ProtocolError(f"goes on at chunk {due} and grants chunks below {limit}")
            if prefix is not None and not self._resumable:
                raise ProtocolError("claims to have the beginning of what cannot be read twice")
            if self._restarting and prefix is not None:
                due, limit = 0, self._window  # it has not heard of the restart yet
                self._cursor = 0
            elif prefix is not None and not (self._kept or self._first or self._ended):
                self._prefix, self._first, self._cursor = prefix, due, due
            elif self._first <= due <= self._first + len(self._kept):
                self._forget(due)
                self._cursor = due
                self._restarting = False
            else:
                raise ProtocolError(f"goes on at chunk {due}, which is not one of those under way")
            self._limit = limit
            self._positioned = True
            self._offer()
            self._changed.notify_all()

    def finish(self, outcome: TransportError | bool) -> None:
        """The receiver has answered, or there will be no answer."""
        with self._changed:
            if self._outcome is None:
                self._outcome = outcome
            self._changed.notify_all()

    # called by the sender

    def run(
        self, chunks: Iterator[Frame], reader: Reader | None, deadline: float | None, *, waits: bool = True
    ) -> None:
        """Send all frames of `chunks`, the last of them END, until the receiver has the whole.

        `waits` is whether making one of them may take its time, or the payload may be at the receiver in part.

        Raises
        ------
        PeerUnreachable
            If the deadline passes, or the peer is given up.
        TransportError
            If the receiver does not take the message.
        """
        if waits:
            return self._push(chunks, reader, deadline)
        with self._changed:
            self._chunks = chunks
            self._offer()
        try:
            self._push(chunks, reader, deadline)
        finally:
            with self._making:
                self._chunks = None
        return None

    def _push(self, chunks: Iterator[Frame], reader: Reader | None, deadline: float | None) -> None:
        made: Frame | None = None
        while True:
            with self._changed:
                if made is not None:
                    self._kept.append(made)
                    self._ended = made.kind == Kind.END
                while not self._is_over():
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise PeerUnreachable("no acknowledgement within the time given")
                    if self._may_send() and not self._is_pulled():
                        break
                    self._changed.wait(left)
                else:
                    return
                connection, prefix, restarts = self._connection, self._prefix, self._restarting and self._cursor == 0
                due = self._cursor - self._first
                frame = self._kept[due] if prefix is None and due < len(self._kept) else None
                if frame is not None:
                    self._cursor += 1
            assert connection is not None
            made = None
            if prefix is not None:
                self._match(prefix, reader)
            elif frame is None:
                made = next(chunks)
            else:
                with contextlib.suppress(ConnectionClosed):
                    if restarts:
                        connection.write(make(Kind.RESTART, self._opening.stream), Lane.BULK)
                    # to the connection for which the cursor stood there; on the next one it may stand elsewhere
                    connection.write(frame, Lane.BULK)

    def _is_pulled(self) -> bool:
        return self._chunks is not None and self._connection is not None and self._connection.pulls

    def _offer(self) -> None:
        """Have the connection pull, if it does not do so already."""
        connection = self._connection
        if connection is not None and self._is_pulled() and self._offered_to is not connection and self._may_send():
            self._offered_to = connection
            with contextlib.suppress(ConnectionClosed):
                connection.offer(functools.partial(self._pull, connection))

    def _pull(self, connection: Connection) -> Frame | None:
        """Make the next frame for a connection, on its thread; None if there is none for it now."""
        with self._making:
            while True:
                with self._changed:
                    chunks, over = self._chunks, self._outcome is not None or self._failure is not None
                    if chunks is None or over or self._connection is not connection or not self._may_send():
                        if self._offered_to is connection:
                            self._offered_to = None
                        return None
                    due = self._cursor - self._first
                    if due < len(self._kept):
                        self._cursor += 1
                        return self._kept[due]
                try:
                    made = next(chunks)
                except BaseException as error:
                    with self._changed:
                        self._failure = error
                        self._changed.notify_all()
                    return None
                with self._changed:
                    self._kept.append(made)
                    self._ended = made.kind == Kind.END

    def _is_over(self) -> bool:
        if self._failure is not None:
            raise self._failure
        if isinstance(self._outcome, TransportError):
            raise self._outcome
        return self._outcome is not None

    def _may_send(self) -> bool:
        if self._connection is None or not self._positioned or self._opening.kind != Kind.OPEN:
            return False
        due = self._cursor - self._first
        if due < len(self._kept) and self._kept[due].kind == Kind.END:
            return True
        if due == len(self._kept) and self._ended:
            return False
        return self._prefix is not None or self._cursor < self._limit

    def _match(self, prefix: bytes, reader: Reader | None) -> None:
        """Go on behind what the receiver has from earlier, or begin anew if that was something else."""
        same = reader is not None and reader.resume(self._first, prefix)
        with self._changed:
            self._prefix = None
            if not same:
                self._restarting = True
                self._first = self._cursor = 0
                self._limit = self._window

    def _forget(self, confirmed: int) -> None:
        while self._kept and self._first < min(confirmed, self._cursor):
            self._kept.popleft()
            self._first += 1
