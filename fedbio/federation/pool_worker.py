"""A process of a simulation's pool: it plays many sites, one task at a time.

Each of them is a real `Site` in a workspace of its own; what it would have got and sent over a network goes through
one pair of sockets. Only so many are kept in memory: the one that was idle longest is put away, and begins again in its
workspace with its next message. One that keeps something that it could not have again there is not put away.

What sites stream for each other in lockstep goes on side by side, each part on a thread of its own.

Run as a program with the number of the socket that it has inherited.
"""

from __future__ import annotations

__all__: list[str] = []

import collections
import contextlib
import importlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from fedbio.errors import FedbioError, FederationError
from fedbio.federation import messages
from fedbio.federation.party import Party
from fedbio.federation.policy import Policy
from fedbio.federation.pool_messages import (
    Failed,
    Left,
    Letter,
    Mail,
    Orders,
    SiteSpec,
    Taken,
    allow_many_files,
    decode_mail,
)
from fedbio.federation.pool_post import Link, Post
from fedbio.federation.site import LIBRARIES, Site
from fedbio.settings import MOST_LAST_LINES, KitFile, load
from fedbio.transport import Credentials, Presence, Received

log = logging.getLogger(__name__)

AT_ONCE = (
    messages.JOB_DONE,
    messages.END,
    messages.ABORT,
    messages.CALL,
    messages.MEAN,
    messages.COMMIT,
    messages.SPLIT,
    messages.SPLIT_END,
)
"""Topics that a site hears of also in the middle of a task."""

_playing = threading.local()
"""Who is played on a thread, for the log."""


@dataclass(eq=False)
class _Seat:
    """A site's place in this process, whether it is in memory or not."""

    spec: SiteSpec
    kit: KitFile
    party: Party
    closing: contextlib.ExitStack
    link: Link
    site: Site | None = None
    waiting: list[tuple[Letter, Received]] = field(default_factory=list)
    calls: int = 0
    """Parts of exchanges that are being sent."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Players:
    """Plays sites as their messages come."""

    def __init__(self, connection: Connection, orders: Orders) -> None:
        self._connection, self._orders = connection, orders
        self._post = Post(connection, orders)
        self._make_executors = _named(orders.executors)
        self._policy = Policy.read(
            Path(), workflows=None, max_rounds=None, code=orders.code, last_lines=MOST_LAST_LINES
        )
        self._seats: dict[str, _Seat] = {}
        self._resident: collections.OrderedDict[str, _Seat] = collections.OrderedDict()
        self._mail: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self) -> None:
        """Play until this process is ended."""
        for spec in self._orders.sites:
            closing = contextlib.ExitStack()
            party = closing.enter_context(Party.open(Path(spec.workspace), spec.name, "site"))
            kit = load(Path(spec.kit) / "kit.yaml", KitFile)
            self._seats[spec.name] = _Seat(spec, kit, party, closing, Link(spec.name, self._post))
        threading.Thread(target=self._read, name="read", daemon=True).start()
        for seat in list(self._seats.values()):
            self._play(seat, _present)
        while True:
            name = self._mail.get()
            if name in self._seats:
                self._play(self._seats[name], Site.attend)

    def _read(self) -> None:
        """Pass messages on as they come: some cannot wait until a task is done."""
        try:
            while True:
                mail = decode_mail(self._connection.recv_bytes())
                if isinstance(mail, Taken):
                    self._post.taken(mail)
                elif isinstance(mail, Letter):
                    self._deliver(mail)
        except (EOFError, OSError):
            # the server has ended, or ends this process: what counts is in the workspaces
            logging.shutdown()
            os._exit(0)
        except BaseException:
            log.exception("this process cannot read its messages")
            logging.shutdown()
            os._exit(1)

    def _deliver(self, letter: Letter) -> None:
        seat = self._seats.get(letter.site)
        if seat is None:
            return self._post.acknowledge(letter, "it has left")
        _playing.name = letter.site
        try:
            received = self._post.received(letter)
        except FedbioError as error:
            log.warning("message not taken topic=%s reason=%s", letter.topic, error)
            return self._post.acknowledge(letter, str(error))
        with seat.lock:
            if seat.site is not None and letter.topic in AT_ONCE:
                self._hand_over(seat, seat.site, letter, received)
            else:
                # decoded when it is its turn: what goes to many is large many times
                seat.waiting.append((letter, received))
        self._mail.put(letter.site)
        return None

    def _hand_over(self, seat: _Seat, site: Site, letter: Letter, received: Received) -> None:
        """Have a site hear a letter, under its lock."""
        if letter.topic != messages.CALL:
            return self._post.hand_over(letter, received, site)
        seat.calls += 1

        def answer() -> None:
            # it takes until all sites that were called have been averaged
            _playing.name = letter.site
            try:
                self._post.hand_over(letter, received, site)
            finally:
                with seat.lock:
                    seat.calls -= 1

        threading.Thread(target=answer, name=f"part-{letter.site}", daemon=True).start()
        return None

    def _play(self, seat: _Seat, act: Callable[[Site], bool]) -> None:
        """Have a site do something; it has left if that returns False."""
        name = _playing.name = seat.spec.name
        try:
            site = self._seated(seat)
            if not act(site):
                site.leave()
                seat.party.finish(LIBRARIES)
                self._dismiss(seat, Left(name))
        except FedbioError as error:
            # else it only repeats that the server has given up
            own = not isinstance(error, FederationError) or (seat.site is not None and error is seat.site.failure)
            log.error("%s", error)
            self._dismiss(seat, Failed(name, str(error), error.exit_code, own))
        except Exception as error:
            log.exception("this is a bug of fedbio, or of what it was given to run")
            self._dismiss(seat, Failed(name, f"{type(error).__name__}: {error}", 1, own=True))
        self._put_away()

    def _seated(self, seat: _Seat) -> Site:
        """Return a site that is in memory, with all messages that have come for it."""
        self._resident[seat.spec.name] = seat
        self._resident.move_to_end(seat.spec.name)
        site = seat.site
        if site is None:
            site = self._make(seat)
            site.begin(seat.party, seat.link)
        with seat.lock:
            for letter, received in seat.waiting:
                self._hand_over(seat, site, letter, received)
            seat.waiting.clear()
            seat.site = site
        return site

    def _make(self, seat: _Seat) -> Site:
        orders, spec = self._orders, seat.spec
        return Site(
            kit=seat.kit,
            credentials=Credentials.from_kit(spec.kit),
            workspace=Path(spec.workspace),
            data=Path(spec.data),
            executors=self._make_executors(),
            allow=orders.allow,
            reuse=None if orders.reuse is None else Path(orders.reuse),
            device=orders.device,
            threads=orders.threads,
            synthetic=orders.synthetic,
            quantization=orders.quantization,
            policy=self._policy,
            examples=orders.examples,
        )

    def _put_away(self) -> None:
        """Let go of those that were idle longest, if they are too many."""
        # one by one where memory is short: what was given back shows later, or was not theirs
        fewest = max(1, len(self._resident) - 1) if _memory_bytes() > self._orders.memory_bytes else len(self._resident)
        for name, seat in list(self._resident.items()):
            if len(self._resident) <= min(fewest, self._orders.resident):
                return
            with seat.lock:
                site = seat.site
                if site is None or seat.calls or not site.at_rest:
                    continue
                seat.site = None
            del self._resident[name]
            # not under the lock, on which whoever reads the messages waits
            site.put_away()

    def _dismiss(self, seat: _Seat, message: Mail) -> None:
        """A site is not played any more."""
        site = seat.site
        with seat.lock:
            seat.site = None
        if site is not None:
            site.close()
        del self._seats[seat.spec.name]
        self._resident.pop(seat.spec.name, None)
        seat.closing.close()
        self._post.tell(message)


def _memory_bytes() -> int:
    """Return what this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _present(site: Site) -> bool:
    site.greet(Presence.ARRIVED)
    return True


def _named(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(site)s %(message)s", datefmt="%H:%M:%S")

    def say_who(record: logging.LogRecord) -> bool:
        record.site = getattr(_playing, "name", "pool")
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(say_who)
    allow_many_files()
    connection = Connection(int(sys.argv[1]))
    orders = msgspec.msgpack.decode(connection.recv_bytes(), type=Orders)
    if orders.prepare:
        _named(orders.prepare)(orders.workflows)
    _Players(connection, orders).run()


if __name__ == "__main__":
    _main()
