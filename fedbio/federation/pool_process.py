"""One process of a simulation's pool, as the server sees it: start it, talk to it, and see it end."""

from __future__ import annotations

__all__ = ["PoolProcess"]

import contextlib
import itertools
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from fedbio.errors import PeerUnreachable, TransportError
from fedbio.federation.pool_messages import Letter, Mail, Orders, Taken, decode_mail
from fedbio.processes import die_with_parent

LAST_LINES = 8
"""Lines of its log that are shown if it is given up."""


@dataclass(eq=False)
class PoolProcess:
    """A process that plays sites; a new one takes its place if it dies.

    Parameters
    ----------
    number : int
        From 0.
    sites : set of str
        Those that it plays and that have not come to their end.
    log : Path
    """

    number: int
    sites: set[str]
    log: Path
    here: set[str] = field(default_factory=set)
    """Those of them that have presented themselves."""
    told: dict[str, str] = field(default_factory=dict)
    """Those of them that were told to end, and by which topic."""
    lives: int = 0
    """How often it was started."""
    heard: bool = False
    """Whether a site has presented itself since it was started last."""
    popen: subprocess.Popen[bytes] | None = None
    _connection: Connection | None = None
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _asked: dict[int, queue.SimpleQueue[str | None]] = field(default_factory=dict)
    """Where each letter's answer goes; None is that of a process that has ended."""

    @property
    def prefix(self) -> str:
        """How the names of its files begin."""
        return f"{self.number}-"

    @property
    def lives_on(self) -> bool:
        """Whether it runs."""
        return self.popen is not None and self.popen.poll() is None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it; it dies with the thread that calls this, whatever ends that."""
        ours, theirs = socket.socketpair()
        with theirs, open(self.log, "ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "fedbio.federation.pool_worker", str(theirs.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the server alone
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        with self._writing:
            self._connection, self.heard = Connection(ours.detach()), False
            self.lives += 1

    def tell(self, message: Mail | Orders) -> None:
        """Send it a message; `OSError` if it is not there."""
        with self._writing:
            if self._connection is None:
                raise BrokenPipeError("it has ended")
            self._connection.send_bytes(msgspec.msgpack.encode(message))

    def ask(self, letter: Letter, timeout_s: float | None, *, life: int | None = None) -> int:
        """Send it a letter and wait until the site has dealt with it.

        Parameters
        ----------
        letter : Letter
        timeout_s : float or None
        life : int, optional
            Send it only to the process that this `lives` counted.

        Returns
        -------
        int
            The `lives` of the process that has it.

        Raises
        ------
        PeerUnreachable
            If the process has ended, or is another one, or does not answer in time.
        TransportError
            If the site does not take it.
        """
        answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self._writing:
            number, taker = next(self._numbers), self.lives
            if self._connection is None or life not in (None, taker):
                raise PeerUnreachable(f"{letter.site}: the process that played it has ended")
            self._asked[number] = answer
            self._connection.send_bytes(msgspec.msgpack.encode(msgspec.structs.replace(letter, number=number)))
        try:
            refusal = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerUnreachable(f"{letter.site}: {letter.topic} was not taken within {timeout_s:g} s") from None
        finally:
            self._asked.pop(number, None)
        if refusal is None:
            raise PeerUnreachable(f"{letter.site}: the process that plays it has ended")
        if refusal:
            raise TransportError(f"{letter.site}: {refusal}")
        return taker

    def answered(self, taken: Taken) -> None:
        """Hear what became of a letter."""
        if (answer := self._asked.get(taken.number)) is not None:
            answer.put(taken.refusal)

    def says(self) -> Iterator[Mail]:
        """Yield what it says, until it has ended."""
        connection = self._connection
        assert connection is not None
        while True:
            try:
                content = connection.recv_bytes()
            except (EOFError, OSError):
                return
            yield decode_mail(content)

    def wait(self) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        assert self.popen is not None
        with self._writing:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            for answer in list(self._asked.values()):
                answer.put(None)
        return self.popen.wait()

    def kill(self) -> None:
        """End it."""
        if self.popen is not None:
            with contextlib.suppress(ProcessLookupError):
                self.popen.kill()

    def last_lines(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
