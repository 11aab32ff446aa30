"""The server's end of live metrics: checks what sites send, keeps it in a file, and hands it to the trackers."""

from __future__ import annotations

__all__ = ["TRACKING_FILE", "Tracking"]

import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from fedbio.errors import ProtocolError
from fedbio.federation.messages import METRICS_IN_MESSAGE, Metric, Metrics, unpack
from fedbio.federation.reporter import EVERY_S
from fedbio.federation.trackers import Tracker, TrackerName, chosen, open_tracker
from fedbio.results import EventLog, utc_now

log = logging.getLogger(__name__)

TRACKING_FILE = "tracking.jsonl"
"""In the server's workspace: every metric that came, one JSON object a line."""

RATE, BURST = 2.0 * METRICS_IN_MESSAGE / EVERY_S, 8.0 * METRICS_IN_MESSAGE
"""Metrics a second that the server takes of a site in the long run, and at once: twice what a site sends."""

KEYS = 1_000
"""Different keys of one job that a site may send."""

POINTS = 1_000_000
"""Metrics of one job that a site may send: about 130 MB of the file."""

TOLD = 10
"""So many refusals of a site are events; a site that sends nonsense shall not fill the log."""

QUEUE = 16_384
"""Metrics that wait for slow trackers; more go into the file only."""

CLOSE_S = 30.0
"""Seconds that trackers have at the end to write what they have."""


@dataclass(frozen=True, slots=True)
class _Text:
    job: str
    key: str
    value: str


@dataclass(slots=True)
class _Account:
    """What a site has sent of late, and in all."""

    credit: float = BURST
    at: float = field(default_factory=time.monotonic)
    keys: dict[str, set[str]] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    refused: int = 0

    def refuse(self, metric: Metric, jobs: Collection[str]) -> str:
        """Count one metric; return why it is not taken, or nothing."""
        if metric.job not in jobs:
            return f"there is no job {metric.job!r}"
        if not math.isfinite(metric.value):
            return f"{metric.key} is {metric.value}"
        keys = self.keys.setdefault(metric.job, set())
        if metric.key not in keys and len(keys) >= KEYS:
            return f"{metric.key} would be key {KEYS + 1} of job {metric.job}"
        if self.points.get(metric.job, 0) >= POINTS:
            return f"job {metric.job} has {POINTS} metrics of it already"
        if not self._has_credit():
            return f"it sends more than {RATE:.0f} metrics a second"
        keys.add(metric.key)
        self.points[metric.job] = self.points.get(metric.job, 0) + 1
        return ""

    def _has_credit(self) -> bool:
        # a bucket of BURST that fills with RATE
        now = time.monotonic()
        self.credit = min(BURST, self.credit + RATE * (now - self.at))
        self.at = now
        if self.credit < 1:
            return False
        self.credit -= 1
        return True


def _continued(path: Path) -> BinaryIO:
    """Open a file to append lines to; the last one of a process that was killed may be cut off."""
    file = open(path, "ab+", buffering=0)
    if size := file.tell():
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


class Tracking:
    """Takes the sites' `Metrics`. Safe to use from several threads.

    Trackers work on a thread of their own and are opened with the first metric: a slow one holds nothing up, and one
    that is not used costs nothing. One that fails is given up; the job and the others go on.

    Parameters
    ----------
    workspace : Path
        The server's folder.
    names : sequence of str or None
        Which trackers, see `fedbio.federation.trackers.chosen`.
    federation, server : str
        Their names.
    events : EventLog
    sites : collection of str
        Who may send metrics.
    jobs : callable
        Returns the names of the jobs that there are.

    Raises
    ------
    SettingsError
        If a tracker's package is not installed.
    """

    def __init__(
        self,
        workspace: Path,
        names: Sequence[TrackerName] | None,
        *,
        federation: str,
        server: str,
        events: EventLog,
        sites: Collection[str],
        jobs: Callable[[], Collection[str]],
    ) -> None:
        self._names = chosen(names)
        self._workspace, self._federation, self._server = workspace, federation, server
        self._events, self._sites, self._jobs = events, frozenset(sites), jobs
        self._accounts = {site: _Account() for site in sites}
        self._lock = threading.Lock()
        self._file = _continued(workspace / TRACKING_FILE)
        self._closed = False
        self._texts: list[_Text] = []
        self._queue: queue.Queue[tuple[str, list[Metric]] | None] = queue.Queue()
        self._waiting = self._missed = 0
        self._thread: threading.Thread | None = None

    def begin(self, job: str, settings: str) -> None:
        """Show what a job was told, beside its first metric."""
        with self._lock:
            self._texts.append(_Text(job, "settings", settings))

    def take(self, site: str, body: bytes) -> None:
        """Take a message of a site; what is wrong with it is an event, and costs the site nothing but these metrics."""
        try:
            message = unpack(Metrics, body)
        except ProtocolError as error:
            return self._refuse(site, [str(error)])
        if site not in self._sites:
            return self._refuse(site, ["it is not expected"])
        if message.left_out:
            log.info("metrics left out by the site, which measures faster than it sends site=%s count=%d",
                     site, message.left_out)  # fmt: skip
        jobs = self._jobs()
        with self._lock:
            if self._closed:
                return None
            account = self._accounts[site]
            reasons = [account.refuse(metric, jobs) for metric in message.entries]
            good = [metric for metric, reason in zip(message.entries, reasons, strict=True) if not reason]
            if good:
                self._keep(site, good)
        return self._refuse(site, [reason for reason in reasons if reason])

    def _keep(self, site: str, metrics: list[Metric]) -> None:
        at = utc_now()
        self._file.write(b"".join(
            msgspec.json.encode({"time": at, "site": site, **msgspec.structs.asdict(each)}) + b"\n" for each in metrics
        ))  # fmt: skip
        if not self._names:
            return
        if self._waiting + len(metrics) > QUEUE:
            self._missed += len(metrics)
            return
        self._waiting += len(metrics)
        self._queue.put((site, metrics))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()

    def _refuse(self, site: str, reasons: Sequence[str]) -> None:
        if not reasons:
            return
        with self._lock:
            # of a site that is not expected no account is kept, one for all of them
            account = self._accounts.setdefault(site if site in self._sites else "", _Account())
            told = account.refused < TOLD
            account.refused += len(reasons)
        if told:
            log.warning("metrics refused site=%s count=%d reason=%s", site, len(reasons), reasons[0])
            self._events.write("metrics refused", site=site, count=len(reasons), reason=reasons[0])

    def close(self) -> None:
        """Wait for the trackers to write what they have, and say what was missed."""
        with self._lock:
            self._closed = True
            self._file.close()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.warning("a tracker has not written everything within %.0f s; %s has it", CLOSE_S, TRACKING_FILE)
        if self._missed:
            log.warning("metrics too many for the trackers count=%d; %s has them", self._missed, TRACKING_FILE)
        for site, account in self._accounts.items():
            if account.refused > TOLD:
                self._events.write("metrics refused in all", site=site or "others", count=account.refused)

    def _run(self) -> None:
        """Hand everything on, on the trackers' thread."""
        trackers: dict[TrackerName, Tracker] = {}

        def each(action: Callable[[Tracker], None]) -> None:
            for name in list(trackers):
                try:
                    action(trackers[name])
                except Exception as error:
                    # whatever a library or a service of others does, it is no reason to end a job
                    self._given_up(name, error)
                    del trackers[name]

        for name in self._names:
            try:
                trackers[name] = open_tracker(name, self._workspace, self._federation)
            except Exception as error:
                self._given_up(name, error)
        while (batch := self._queue.get()) is not None:
            site, metrics = batch
            with self._lock:
                texts, self._texts = self._texts, []
            each(functools.partial(self._hand_on, site, metrics, texts))
            if self._queue.empty():
                each(lambda tracker: tracker.flush())
            with self._lock:
                self._waiting -= len(metrics)
        each(lambda tracker: tracker.close())

    def _hand_on(self, site: str, metrics: Sequence[Metric], texts: Sequence[_Text], tracker: Tracker) -> None:
        for text in texts:
            tracker.text(self._server, text.job, text.key, text.value, 0)
        for metric in metrics:
            tracker.scalar(site, metric.job, metric.key, metric.value, metric.step)

    def _given_up(self, name: str, error: Exception) -> None:
        log.warning("tracker given up name=%s reason=%s: %s; %s has everything", name, type(error).__name__, error,
                    TRACKING_FILE)  # fmt: skip
        self._events.write("tracker given up", tracker=name, reason=f"{type(error).__name__}: {error}")
