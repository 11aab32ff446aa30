"""The models that a site holds for runs that are averaged in lockstep: the server has none of them."""

from __future__ import annotations

__all__ = ["Held"]

import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from fedbio.errors import FederationError
from fedbio.federation.messages import Exchange
from fedbio.federation.model import Delivery, Parameters
from fedbio.tensors import open_file
from fedbio.transport import FilePayload, Payload, Sink

ADOPT_S = 600.0
"""Seconds that a task waits for a model that has arrived, and whose commitment is on its way."""


class Held:
    """A site's models of rounds, in files, and the part that it puts into the next exchange, in memory.

    A job's models are those of its runs, whose names come from the server: folders are named by their digests.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, tuple[Delivery, Payload]] = {}
        self._arrived: set[tuple[str, int]] = set()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        for left in folder.rglob("arriving-*"):
            left.unlink()

    def model(self, run: str, number: int) -> Parameters:
        """Return the model of a round, as read-only arrays over its file.

        Raises
        ------
        FederationError
            If this site does not hold it.
        """
        path = self._path(run, number)
        with self._changed:
            # the server's word that it counts may be a moment behind the task that needs it
            self._changed.wait_for(lambda: path.exists() or (run, number) not in self._arrived, ADOPT_S)
        if not path.exists():
            raise FederationError(f"this site does not hold the model of round {number} of {run}")
        return dict(open_file(path))

    @property
    def keeps(self) -> bool:
        """Whether there is something here that is in no file that counts: a part, or a mean that may come to count."""
        return bool(self._parts or self._arrived)

    def keep_part(self, delivery: Delivery, payload: Payload) -> None:
        """Keep what this site puts into the exchange that a task was for; one of each job at a time."""
        self._parts[_job(delivery.run)] = (delivery, payload)

    def part(self, exchange: Exchange) -> Payload:
        """Return what this site puts into an exchange: what it has trained for it, or a model that others lack.

        Raises
        ------
        FederationError
            If it has neither.
        """
        kept, path = self._parts.get(_job(exchange.run)), self._path(exchange.run, exchange.round)
        if kept is not None and (kept[0].run, kept[0].round) == (exchange.run, exchange.round):
            return kept[1]
        if not path.exists():
            raise FederationError(f"this site has no part in round {exchange.round} of {exchange.run}")
        return FilePayload(path)

    def store(self, exchange: Exchange, size: int) -> Sink:
        """Return where a mean goes while it arrives."""
        path = self._path(exchange.run, exchange.round)
        # a new attempt may begin before the last one has ended
        arriving = path.with_name(f"arriving-{next(self._numbers)}")
        return _Arriving(arriving, size, lambda: self._note_arrival(exchange))

    def adopt(self, exchange: Exchange, mean: Path) -> None:
        """Make a mean the model of its round, and remove those that nobody will ask for."""
        with self._changed:
            os.replace(mean, self._path(exchange.run, exchange.round))
            self._arrived.discard((exchange.run, exchange.round))
            # what was trained for this round is in it
            self._parts.pop(_job(exchange.run), None)
            self._changed.notify_all()
        wanted = {self._path(exchange.run, number).name for number in exchange.keep}
        for path in mean.parent.glob("round-*"):
            if path.name not in wanted and path != self._path(exchange.run, exchange.round):
                path.unlink()

    def forget(self, job: str) -> None:
        """Remove the models of a job's runs: it has come to its end."""
        self._parts.pop(job, None)
        shutil.rmtree(self._folder / _digest(job), ignore_errors=True)

    def _note_arrival(self, exchange: Exchange) -> None:
        with self._changed:
            self._arrived.add((exchange.run, exchange.round))

    def _path(self, run: str, number: int) -> Path:
        job, _, rest = run.partition("/")
        return self._folder / _digest(job) / _digest(rest) / f"round-{number:05}.safetensors"


def _job(run: str) -> str:
    return run.partition("/")[0]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


class _Arriving(Sink):
    """A file that is whole at the end; `Received.payload` is its path."""

    def __init__(self, path: Path, size: int, arrived: Callable[[], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._arrived = path, arrived
        self._file = open(path, "wb", buffering=0)
        if size:
            # a disk without room is noticed at once
            os.posix_fallocate(self._file.fileno(), 0, size)

    def write(self, chunk: memoryview) -> None:
        while len(chunk):
            chunk = chunk[self._file.write(chunk) :]

    def finish(self) -> Path:
        self._file.close()
        self._arrived()
        return self._path

    def abort(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
