"""Run what must not hold a connection up on threads that end with the process."""

from __future__ import annotations

__all__ = ["Workers"]

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Workers:
    """Daemon threads that are started as they are needed and kept for the next piece of work.

    The standard library's pool waits for its threads when the interpreter ends; a handler in the middle of an hour of
    training would keep a stopped process alive.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0
        self._closed = False

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` on a thread as soon as one is free."""
        with self._lock:
            if self._closed:
                return
            self._pending += 1
            if self._pending > self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._work.put(work)

    def close(self) -> None:
        """Take no more work; threads end with what they are doing now."""
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:
                # a handler's bug must not take the connections of the other peers with it
                log.exception("%s: a handler failed", self._name)
            finally:
                del work  # it may hold a model, and the next may come late
                with self._lock:
                    self._pending -= 1
