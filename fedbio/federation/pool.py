"""Reach sites that a few processes of this machine play: what a server of a simulation has in place of a network."""

from __future__ import annotations

__all__ = ["Pool", "PoolEndpoint"]

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from fedbio.errors import FedbioError, FederationError, InputError, PeerUnreachable, RefusedError
from fedbio.federation import messages
from fedbio.federation.pool_messages import Failed, Left, Letter, Mail, Orders, Taken, allow_many_files
from fedbio.federation.pool_payloads import Shelf, lay_out, make_folders, mapped, poured, remove
from fedbio.federation.pool_process import PoolProcess
from fedbio.transport import MemorySink, Opening, Payload, Presence, Received, ReceivedPayload, TensorSink
from fedbio.transport.receiver import Agreed, SinkFactory

log = logging.getLogger(__name__)

LIVES = 5
"""How often a process of the pool is started before it is given up."""

LEAVE_S = {messages.END: 60.0, messages.ABORT: 3.0}
"""Seconds in which sites have to end that were told so."""

KEEPER_S = 10.0
"""Seconds that whoever listens to a process has to notice its end."""

ERRORS: dict[int, type[FedbioError]] = {1: FedbioError, 2: InputError, 4: RefusedError}
"""What a site has ended with, by its exit code."""

HELD = (messages.MEAN, messages.COMMIT)
"""Topics whose sender has to know that the site has dealt with them, and that it is still the same process."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Who plays which sites.

    Parameters
    ----------
    orders : Orders
        With all sites; each process gets its own ones.
    processes : int
    environment : mapping of str to str
        Of the processes.
    folder : Path
        For their logs, and for payloads that memory has no room for.
    alone : set of str
        Sites that wait for another site in the middle of a task: each gets a process of its own, beside the others.
    """

    orders: Orders
    processes: int
    environment: Mapping[str, str]
    folder: Path
    alone: Set[str] = frozenset()

    @property
    def shares(self) -> list[set[str]]:
        """Whom each process plays; always the same: a site's tasks stay in order, and what is in memory is of use."""
        names = {site.name for site in self.orders.sites}
        together = sorted(names - self.alone)
        shares = [set(together[number :: self.processes]) for number in range(self.processes)]
        return [share for share in shares if share] + [{name} for name in sorted(names & self.alone)]

    def endpoint(self, on_failure: Callable[[FedbioError], None]) -> Callable[..., PoolEndpoint]:
        """Return what a `Server` makes its endpoint with; `on_failure` is told of sites that ended by themselves."""

        def make(address: str, credentials: object, **options: Any) -> PoolEndpoint:
            # the rest is a network's matter
            named = {name: options[name] for name in ("on_message", "on_peer", "sinks", "schemes")}
            return PoolEndpoint(self, on_failure=on_failure, **named)

        return make


class PoolEndpoint:
    """A server's way to sites that are played by a pool of processes.

    A message is handed on once the process has it in its pipe, and a site's payload is taken, checked and answered as
    one from a network would be. A process that dies takes its sites with it: they are gone, and present themselves
    anew when the next process plays them, each in its workspace; what they were asked they are asked again.

    Parameters
    ----------
    pool : Pool
    on_message, on_peer, sinks, schemes
        See `fedbio.transport.ServerEndpoint`.
    on_failure : callable
        Told of a site that has ended with an error of its own, or of a process that cannot be kept alive.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        on_message: Callable[[Received], None],
        on_peer: Callable[[str, Presence], None],
        sinks: Mapping[str, SinkFactory],
        schemes: Agreed,
        on_failure: Callable[[FedbioError], None],
    ) -> None:
        self.address = f"a pool of {len(pool.shares)} processes"
        self._pool = pool
        self._on_message, self._on_peer, self._on_failure = on_message, on_peer, on_failure
        self._sinks, self._schemes = dict(sinks), schemes
        self._changed = threading.Condition()
        self._closing = False
        self._processes = [
            PoolProcess(number, share, pool.folder / f"process-{number + 1}.txt")
            for number, share in enumerate(pool.shares)
        ]
        self._of = {site: process for process in self._processes for site in process.sites}
        self._keepers: list[threading.Thread] = []
        self._folders: list[str] = []
        self._shelf = Shelf(self._folders)
        self._mean_at: dict[str, int] = {}
        """Which process of a site has got a mean, by its `lives`."""

    def __enter__(self) -> Self:
        allow_many_files()
        self._folders += make_folders(self._pool.folder)
        for process in self._processes:
            name = f"pool-{process.number + 1}"
            self._keepers.append(threading.Thread(target=self._keep, args=(process,), name=name, daemon=True))
            self._keepers[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def peers(self) -> tuple[str, ...]:
        """Return the names of the sites that are here, sorted."""
        with self._changed:
            return tuple(sorted(site for process in self._processes for site in process.here))

    def send(
        self, peer: str, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> None:
        """Hand a message to the process that plays a site.

        Raises
        ------
        PeerUnreachable
            If the site is not here.
        """
        process = self._of.get(peer)
        if process is None or peer not in process.here:
            raise PeerUnreachable(f"{peer} is not here; {topic} was not sent")
        if topic in LEAVE_S:
            process.told[peer] = topic
        letter = self._letter(peer, topic, body, payload)
        try:
            if topic in HELD:
                # as a connection would be: what its process was told is not said to the next one
                life = self._mean_at.get(peer) if topic == messages.COMMIT else None
                self._mean_at[peer] = process.ask(letter, timeout_s, life=life)
            else:
                process.tell(letter)
        except OSError as error:
            raise PeerUnreachable(f"{peer}: the process that plays it has ended") from error

    def _letter(self, peer: str, topic: str, body: bytes, payload: Payload | None) -> Letter:
        if payload is None:
            return Letter(peer, topic, body)
        # nobody holds on to what only passes: its file is the receiver's
        once = topic == messages.SPLIT
        path = lay_out(payload, self._folders, "server-") if once else self._shelf.path(payload)
        return Letter(peer, topic, body, payload.kind, path, Path(path).stat().st_size, once=once)

    def close(self) -> None:
        """Wait for the sites that were told to end, then end all processes; may be called twice."""
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: not self._ending(time.monotonic() - began), max(LEAVE_S.values()))
            self._closing = True
        for process in self._processes:
            # it keeps nothing that is not in the workspaces
            process.kill()
        for keeper in self._keepers:
            keeper.join(KEEPER_S)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _ending(self, seconds: float) -> bool:
        """Whether a site may still be about to end."""
        return any(
            process.lives_on and seconds < LEAVE_S[process.told[site]]
            for process in self._processes
            for site in process.sites & process.told.keys()
        )

    # the processes

    def _keep(self, process: PoolProcess) -> None:
        """Have a process play its sites to their end, and another one if it dies."""
        try:
            while self._start(process):
                sites = [site for site in self._pool.orders.sites if site.name in process.sites]
                orders = msgspec.structs.replace(
                    self._pool.orders, sites=sites, folders=self._folders, prefix=process.prefix
                )
                with contextlib.suppress(OSError):
                    process.tell(orders)
                for mail in process.says():
                    self._take(process, mail)
                if not self._bury(process):
                    return
        except BaseException as error:
            log.exception("a process of the pool is lost")
            self._on_failure(FedbioError(f"a process of the pool is lost: {type(error).__name__}: {error}"))

    def _start(self, process: PoolProcess) -> bool:
        """Start a process, unless there shall be none any more."""
        with self._changed:
            if not self._closing:
                process.start(self._pool.environment)
            return not self._closing

    def _take(self, process: PoolProcess, mail: Mail) -> None:
        if isinstance(mail, Letter):
            if mail.topic == messages.PART and mail.kind:
                # all parts of an exchange are taken in side by side, and each only as fast as the others
                name = f"part-{mail.site}"
                threading.Thread(target=self._take_letter, args=(process, mail), name=name, daemon=True).start()
            else:
                self._take_letter(process, mail)
        elif isinstance(mail, Taken):
            process.answered(mail)
        elif isinstance(mail, (Left, Failed)):
            if isinstance(mail, Failed) and mail.own:
                log.error("site ended site=%s reason=%s", mail.site, mail.reason)
                kind = ERRORS.get(mail.exit_code, FederationError)
                self._on_failure(kind(f"{mail.site}: {mail.reason}"))
            with self._changed:
                process.sites.discard(mail.site)
                process.here.discard(mail.site)
                self._changed.notify_all()
            self._on_peer(mail.site, Presence.GONE)

    def _take_letter(self, process: PoolProcess, letter: Letter) -> None:
        if letter.topic == messages.JOIN:
            process.heard = True
            with self._changed:
                process.here.add(letter.site)
        payload, refusal = None, ""
        try:
            if letter.kind:
                payload = self._received(letter)
        except FedbioError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"cannot be stored: {error.strerror}"
        finally:
            remove(letter.path)
        if letter.number:
            with contextlib.suppress(OSError):
                process.tell(Taken(letter.number, refusal))
        if refusal:
            log.info("message rejected peer=%s topic=%s reason=%s", letter.site, letter.topic, refusal)
        else:
            self._on_message(Received(letter.site, letter.topic, letter.body, payload, letter.size))

    def _received(self, letter: Letter) -> Any:
        """Return what a letter's payload becomes, as if it had come over a network."""
        content = mapped(letter)
        opening = Opening(letter.site, letter.topic, letter.body, letter.kind, letter.size)
        if (make := self._sinks.get(letter.topic)) is not None:
            return poured(content, make(opening))
        if letter.kind == "quantized":
            return poured(content, TensorSink(MemorySink, self._schemes(opening)))
        return ReceivedPayload(content)

    def _bury(self, process: PoolProcess) -> bool:
        """A process has ended; return whether another one shall play its sites."""
        code = process.wait()
        for folder in self._folders:
            for left in Path(folder).glob(f"{process.prefix}*"):
                left.unlink(missing_ok=True)
        with self._changed:
            gone, process.here = sorted(process.here), set()
            self._changed.notify_all()
            if self._closing or not process.sites:
                return False
        log.warning("process of the pool ended number=%d code=%d sites=%d", process.number + 1, code, len(gone))
        for site in gone:
            self._on_peer(site, Presence.GONE)
        if process.heard and process.lives < LIVES:
            return True
        self._on_failure(
            FederationError(
                f"process {process.number + 1} of the pool has ended {process.lives} times, the last time with code "
                f"{code}; its last lines ({process.log}):\n{process.last_lines()}"
            )
        )
        return False
