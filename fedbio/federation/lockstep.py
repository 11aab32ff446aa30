"""The server's end of averaging in lockstep: the sites' models pass through it and leave as their mean.

All sites that hold a part are called at once. Their streams are pulled side by side (`fedbio.tensors.mean_chunks`), and
each chunk of the mean leaves for every receiver as soon as it is computed, so that the server needs a few chunks of
memory and no disk. What a receiver has got counts only with the commit: it is sent when every part was whole, its
digest right and its values finite. A part at fault ends the attempt, and the next one does without that site.
"""

from __future__ import annotations

__all__ = ["Exchanged", "Lockstep", "Send"]

import collections
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fedbio.errors import FederationError, PeerUnreachable, ProtocolError, TransportError
from fedbio.federation import messages
from fedbio.federation.messages import Exchange, pack, unpack
from fedbio.files import whole_file
from fedbio.tensors import SiteFault, mean_chunks, mean_size
from fedbio.tensors.check import Manifest
from fedbio.transport import BytesPayload, Opening, Payload, Received, Sink

log = logging.getLogger(__name__)

QUEUED_CHUNKS = 2
"""Chunks of a site's stream that wait to be averaged; the transport holds a window more."""

OPENING_S = 120.0
"""Seconds from the call to a site to the first bytes of its part."""

COMMIT_S = 30.0
"""Seconds that a site has to hear that the mean counts."""

Send = Callable[[str, str, bytes, Payload | None, float | None], object]
"""Sends to a site: its name, topic, body, payload, and the seconds that it may take; raises `TransportError`."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What came of an exchange."""

    exchange: Exchange
    parts: tuple[str, ...]
    """The sites whose parts are in the mean."""
    holders: tuple[str, ...]
    """The sites that hold the mean."""
    faults: Mapping[str, str]
    """The sites that could not be part of it, each with the reason."""


class Lockstep:
    """Averages what sites stream. Register `sink` for the topic `messages.PART`, pass on what arrives, and who is gone.

    Parameters
    ----------
    send : callable
        How to send to a site.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._attempts: dict[Exchange, _Attempt] = {}
        self._interrupted: dict[str, str] = {}
        # sites answer the newest call, and hold one mean that does not count yet
        self._turn = threading.Lock()
        self._lock = threading.Lock()

    # what the transport reports

    def sink(self, opening: Opening) -> Sink:
        """Return where a site's part goes; refuse one that nobody has called for."""
        exchange = unpack(Exchange, opening.body)
        with self._lock:
            attempt = self._attempts.get(exchange)
        if attempt is None:
            raise ProtocolError(f"attempt {exchange.attempt} of this exchange is over")
        return attempt.open(opening.peer)

    def gone(self, site: str) -> None:
        """A site's process has left, or another one has taken its place: it will not send what it was called for."""
        with self._lock:
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.lose(site, "it has gone")

    def interrupt(self, job: str, reason: str) -> None:
        """End what is under way for a job, and let nothing more of it begin."""
        with self._lock:
            self._interrupted[job] = reason
            attempts = [attempt for exchange, attempt in self._attempts.items() if _job(exchange) == job]
        for attempt in attempts:
            attempt.close(reason)

    @contextlib.contextmanager
    def _in_turn(self, timeout_s: float | None) -> Iterator[None]:
        """Wait until the exchanges of other jobs are over."""
        if not self._turn.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise FederationError(f"the exchange of another job has not ended within {timeout_s:g} s")
        try:
            yield
        finally:
            self._turn.release()

    def take(self, received: Received) -> None:
        """Deal with a message of the topic `messages.PART`: a part that has arrived, or word that there is none."""
        if received.payload is None:
            with self._lock:
                attempt = self._attempts.get(unpack(Exchange, received.body))
            if attempt is not None:
                attempt.lose(received.peer, "it holds no part; its log says why")

    # what a controller asks

    def average(
        self,
        weights: Mapping[str, float],
        manifest: Manifest,
        receivers: Sequence[str],
        *,
        run: str = "",
        number: int = 0,
        keep: Sequence[int] = (),
        min_parts: int = 1,
        timeout_s: float | None = None,
        on_commit: Callable[[Exchanged], None] | None = None,
    ) -> Exchanged:
        """Average the parts of sites and hand the mean to receivers; repeat without those that are at fault.

        Parameters
        ----------
        weights : mapping of str to float
            The sites that hold a part, and their weights; those of weight 0 are not called.
        manifest : mapping of str to (shape, dtype)
            What each part must be, its tensors in this order.
        receivers : sequence of str
            The sites that get the mean.
        run, number : str, int
            Whose model it is and the round that begins with it, for the sites.
        keep : sequence of int
            Earlier rounds whose models the sites shall keep.
        min_parts : int
            How many parts there must be.
        timeout_s : float, optional
            Seconds for all of it.
        on_commit : callable, optional
            Called when the mean is certain and before any site is told: the place to note it.

        Raises
        ------
        FederationError
            If too few parts are left, or nobody has got the mean; names each site at fault, and why.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        parts = {site: weight for site, weight in weights.items() if weight > 0}
        exchange = Exchange(uuid.uuid4().hex, 1, run, number, tuple(keep))
        with self._in_turn(timeout_s):
            return self._average(exchange, weights, parts, manifest, receivers, min_parts, deadline, on_commit)

    def _average(
        self,
        exchange: Exchange,
        weights: Mapping[str, float],
        parts: dict[str, float],
        manifest: Manifest,
        receivers: Sequence[str],
        min_parts: int,
        deadline: float | None,
        on_commit: Callable[[Exchanged], None] | None,
    ) -> Exchanged:
        faults: dict[str, str] = {}
        while True:
            if (reason := self._interrupted.get(_job(exchange))) is not None:
                raise FederationError(reason)
            if len(parts) < max(1, min_parts):
                raise FederationError(
                    f"{len(parts)} of {len(weights)} sites can be averaged, {max(1, min_parts)} are needed; "
                    + "; ".join(f"{site}: {reason}" for site, reason in sorted(faults.items()))
                )
            try:
                holders = self._attempt(exchange, parts, manifest, receivers, deadline)
            except SiteFault as fault:
                log.warning("left out site=%s attempt=%d reason=%s", fault.site, exchange.attempt, fault.reason)
                faults[fault.site] = fault.reason
                del parts[fault.site]
                exchange = msgspec.structs.replace(exchange, attempt=exchange.attempt + 1)
                continue
            done = Exchanged(exchange, tuple(sorted(parts)), holders, faults)
            if on_commit is not None:
                on_commit(done)
            return replace(done, holders=self.commit(exchange, holders))

    def fetch(
        self,
        site: str,
        manifest: Manifest,
        path: Path,
        *,
        run: str = "",
        number: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Stream one site's part into a file here.

        Raises
        ------
        FederationError
            If it cannot be had.
        """
        exchange = Exchange(uuid.uuid4().hex, 1, run, number)
        try:
            with (
                self._in_turn(timeout_s),
                self._calling(exchange, [site], timeout_s) as attempt,
                whole_file(path) as beside,
                open(beside, "wb") as file,
            ):
                for chunk in mean_chunks(attempt.inboxes, {site: 1.0}, manifest):
                    file.write(chunk)
        except ProtocolError as error:
            raise FederationError(f"the model of round {number} of {run} cannot be fetched: {error}") from error

    def commit(self, exchange: Exchange, holders: Sequence[str]) -> tuple[str, ...]:
        """Tell sites that the mean that they hold counts; return those that have heard it."""
        return _each(holders, lambda site: self._send(site, messages.COMMIT, pack(exchange), None, COMMIT_S))

    def _attempt(
        self,
        exchange: Exchange,
        parts: Mapping[str, float],
        manifest: Manifest,
        receivers: Sequence[str],
        deadline: float | None,
    ) -> tuple[str, ...]:
        """Average once; return the receivers that hold the whole mean."""
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        with self._calling(exchange, parts, timeout_s) as attempt:
            chunks = attempt.mean(parts, manifest)
            mean = BytesPayload(chunks, readers=len(receivers), size=mean_size(manifest))

            def pass_on(site: str) -> None:
                try:
                    self._send(site, messages.MEAN, pack(exchange), mean, timeout_s)
                except ValueError as error:
                    # it failed before this receiver began to read it
                    raise attempt.failure or error from None

            holders = _each(receivers, pass_on)
            if not holders and attempt.failure is None:
                # they may have waited too long for a part that will not come: see whose it is
                with contextlib.suppress(_BrokenOff):
                    collections.deque(chunks, maxlen=0)
        if attempt.failure is not None:
            raise attempt.failure
        if not holders:
            raise FederationError(f"none of {', '.join(receivers)} has received the mean; see the log for each reason")
        return holders

    @contextlib.contextmanager
    def _calling(self, exchange: Exchange, sites: Iterable[str], timeout_s: float | None) -> Iterator[_Attempt]:
        """Call for parts, and take them in while the block runs."""
        attempt = _Attempt(sites)
        with self._lock:
            self._attempts[exchange] = attempt

        def call(site: str) -> None:
            try:
                self._send(site, messages.CALL, pack(exchange), None, timeout_s)
            except TransportError as error:
                attempt.lose(site, str(error).removeprefix(f"{site}: "))

        try:
            for site in attempt.inboxes:
                threading.Thread(target=call, args=(site,), name=f"lockstep-call-{site}", daemon=True).start()
            yield attempt
        finally:
            with self._lock:
                del self._attempts[exchange]
            attempt.close(f"attempt {exchange.attempt} of this exchange is over")


class _Attempt:
    """The parts that are called for, and what became of them."""

    def __init__(self, parts: Iterable[str]) -> None:
        self.inboxes = {site: _Inbox() for site in parts}
        self.failure: ProtocolError | None = None

    def open(self, site: str) -> Sink:
        """Return where a site's part goes."""
        inbox = self.inboxes.get(site)
        if inbox is None or inbox.opened:
            raise ProtocolError("the part was not called for, or came already")
        inbox.opened = True
        return inbox

    def lose(self, site: str, reason: str) -> None:
        """A site will not send its part, or not the rest of it."""
        if (inbox := self.inboxes.get(site)) is not None:
            inbox.fail(reason)

    def close(self, reason: str) -> None:
        """Nothing is pulled any more: refuse what still comes."""
        for inbox in self.inboxes.values():
            inbox.fail(reason)

    def mean(self, weights: Mapping[str, float], manifest: Manifest) -> Iterator[memoryview]:
        """Yield the mean; what went wrong is kept in `failure`."""
        try:
            yield from mean_chunks(self.inboxes, weights, manifest)
        except ProtocolError as error:
            self.failure = error
            # no answer of a receiver: the transport cancels what is under way to it
            raise _BrokenOff(str(error)) from error


class _BrokenOff(Exception):
    """There is no mean; why, is kept elsewhere."""


class _Inbox(Sink):
    """One site's part: the transport puts chunks in, and waits when there are enough; `mean_chunks` takes them out."""

    def __init__(self) -> None:
        self.opened = False
        self._chunks: collections.deque[memoryview] = collections.deque()
        self._changed = threading.Condition()
        self._whole = False
        self._failure: str | None = None

    def write(self, chunk: memoryview) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._chunks) < QUEUED_CHUNKS or self._failure is not None)
            if self._failure is not None:
                raise TransportError(self._failure)
            # kept beyond the call: a frame's payload is memory of its own
            self._chunks.append(chunk)
            self._changed.notify_all()

    def finish(self) -> bool:
        with self._changed:
            self._whole = True
            self._changed.notify_all()
        return True

    def abort(self) -> None:
        self.fail("its stream was broken off")

    def fail(self, reason: str) -> None:
        """There will be no more, if there is not the whole already."""
        with self._changed:
            if not self._whole and self._failure is None:
                self._failure = reason
            self._changed.notify_all()

    def __iter__(self) -> Iterator[memoryview]:
        # between its call and its first chunk a site is not watched by the transport
        with self._changed:
            if not self._changed.wait_for(lambda: self.opened or self._failure is not None, OPENING_S):
                raise PeerUnreachable(f"it has not begun to send within {OPENING_S:g} s")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._whole or self._failure is not None)
                if self._failure is not None:
                    raise PeerUnreachable(self._failure)
                if not self._chunks:
                    return
                chunk = self._chunks.popleft()
                self._changed.notify_all()
            yield chunk


def _job(exchange: Exchange) -> str:
    return exchange.run.partition("/")[0]


def _each(sites: Sequence[str], work: Callable[[str], object]) -> tuple[str, ...]:
    """Do something for all sites at once; return those for which it worked, sorted."""
    done: list[str] = []

    def run(site: str) -> None:
        try:
            work(site)
            done.append(site)
        except (TransportError, _BrokenOff) as error:
            log.info("not delivered site=%s reason=%s", site, error)

    threads = [threading.Thread(target=run, args=(site,), name=f"lockstep-{site}", daemon=True) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tuple(sorted(done))
