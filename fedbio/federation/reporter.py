"""The site's end of live metrics: gathers what scripts measure and sends it a few times a second."""

from __future__ import annotations

__all__ = ["Reporter", "plain_key"]

import logging
import math
import re
import threading
from collections import deque
from collections.abc import Callable

from fedbio.errors import PeerUnreachable, TransportError
from fedbio.federation.messages import MAX_STEP, METRIC_KEY_CHARACTERS, METRICS_IN_MESSAGE, Metric, Metrics, pack

log = logging.getLogger(__name__)

EVERY_S = 0.5
"""Seconds between two messages with metrics."""

WAITING = 4 * METRICS_IN_MESSAGE
"""Metrics that may wait; of more, the oldest are left out: a training is not held up by its curves."""

_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_ .:/-]")
_BEGINNINGS = re.compile(r"(^|/)[ .:/-]+")


def plain_key(key: str) -> str:
    """Return a key as it may travel: other characters become underscores, and it is cut to 200.

    Examples
    --------
    >>> plain_key("loss (train)"), plain_key("../accuracy%")
    ('loss _train_', 'accuracy_')
    """
    return _BEGINNINGS.sub(r"\1", _NOT_IN_KEYS.sub("_", key))[:METRIC_KEY_CHARACTERS].rstrip("/ ") or "_"


class Reporter:
    """Takes numbers at any pace, from any thread, and sends them in batches. It never waits for the server.

    Parameters
    ----------
    send : callable
        Sends the body of a `Metrics` message; raises `TransportError` if it did not arrive.

    Notes
    -----
    A message whose connection was lost for good is sent again: after a restart of the server a number may be there
    twice.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._waiting: deque[Metric] = deque()
        self._left_out = 0
        self._not_finite: set[str] = set()
        self._changed = threading.Condition()
        # one message at a time, so that they arrive in order
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, job: str, key: str, value: float, step: int | None = None) -> None:
        """Take one number, to be sent within half a second; one that is not finite is not sent."""
        value = float(value)
        if not math.isfinite(value):
            if key not in self._not_finite:
                self._not_finite.add(key)
                log.warning("metric not sent key=%s value=%s: only finite numbers travel", key, value)
            return
        metric = Metric(job, plain_key(key), value, min(max(0, int(step or 0)), MAX_STEP))
        with self._changed:
            if len(self._waiting) >= WAITING:
                self._waiting.popleft()
                self._left_out += 1
            self._waiting.append(metric)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
                self._thread.start()
            self._changed.notify()

    def flush(self) -> None:
        """Send what waits; what cannot be delivered now goes with a later message."""
        while self._send_some():
            pass

    def close(self) -> None:
        """Send what waits, once, and stop."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self.flush()

    def _run(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
            self._send_some()
            self._closed.wait(EVERY_S)

    def _send_some(self) -> bool:
        """Send one message; return whether there may be another one to send."""
        if not self._waiting:
            # at the end of a task, which shall not wait for a message that is under way in vain
            return False
        with self._sending:
            with self._changed:
                entries = [self._waiting.popleft() for _ in range(min(len(self._waiting), METRICS_IN_MESSAGE))]
                left_out, self._left_out = self._left_out, 0
            if not entries:
                return False
            try:
                self._send(pack(Metrics(entries, left_out)))
            except PeerUnreachable as error:
                log.info("metrics wait for the server: %s", error)
                self._put_back(entries, left_out)
                return False
            except TransportError as error:
                log.warning("metrics not accepted by the server: %s", error)
                return False
        return True

    def _put_back(self, entries: list[Metric], left_out: int) -> None:
        with self._changed:
            room = WAITING - len(self._waiting)
            kept = entries[max(0, len(entries) - room) :]
            self._waiting.extendleft(reversed(kept))
            self._left_out += left_out + len(entries) - len(kept)
