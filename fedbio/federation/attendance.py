"""Who is here: the sites that have joined, were lost, came back, or left."""

from __future__ import annotations

__all__ = ["GATHER_S", "SAY_EVERY_S", "Attendance"]

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedbio.errors import FederationError
from fedbio.federation.messages import Join
from fedbio.results import EventLog

log = logging.getLogger(__name__)

SAY_EVERY_S = 10.0
"""Seconds between two lines that say who is waited for."""

GATHER_S = 10.0
"""Once enough sites are here, seconds in which the other expected ones may still come before a job begins."""

LOOK_EVERY_S = 0.2
"""Seconds between two looks at what is waited for besides the sites."""


@dataclass(slots=True)
class _Presence:
    here: bool = False
    lost: bool = False
    since: float = field(default_factory=time.monotonic)
    join: Join = field(default_factory=lambda: Join(version=""))


class Attendance:
    """Keeps track of the sites of a federation.

    Parameters
    ----------
    expected : sequence of str
        The sites that take part.
    events : EventLog
    changed : threading.Condition
        Notified of every change; its lock is a reentrant one.
    """

    def __init__(self, expected: Sequence[str], events: EventLog, changed: threading.Condition) -> None:
        self._events, self._changed = events, changed
        self._sites = {name: _Presence() for name in expected}
        self._arrivals: collections.Counter[str] = collections.Counter()

    def joined(self, site: str, join: Join) -> None:
        """A site's process has presented itself."""
        with self._changed:
            self._sites[site] = _Presence(here=True, join=join)
            self._arrivals[site] += 1
            self._changed.notify_all()
        self._events.write("site joined", site=site, version=join.version)
        log.info("site joined site=%s", site)

    def back(self, site: str) -> bool:
        """A process that was lost is here again; return whether it was."""
        with self._changed:
            presence = self._sites.get(site)
            if presence is None or not presence.lost:
                return False
            presence.here, presence.lost, presence.since = True, False, time.monotonic()
            self._changed.notify_all()
        self._events.write("site back", site=site)
        return True

    def leaves(self, site: str, *, lost: bool) -> None:
        """A site's process is not here any more; `lost` is whether it may come back."""
        with self._changed:
            presence = self._sites.get(site)
            if presence is None or not (presence.here or presence.lost):
                return
            if presence.here:
                presence.since = time.monotonic()
            presence.here, presence.lost = False, lost
            self._changed.notify_all()
        self._events.write("site lost" if lost else "site gone", site=site)

    def is_here(self, site: str) -> bool:
        """Whether a site is connected."""
        with self._changed:
            return self._sites[site].here

    def seconds_away(self, site: str) -> float:
        """Return for how long a site has been away."""
        with self._changed:
            return time.monotonic() - self._sites[site].since

    def sites(self, job: str = "") -> tuple[str, ...]:
        """Return the sites that are here and take part in a job, sorted by name."""
        with self._changed:
            return tuple(
                name
                for name, site in self._sites.items()
                if site.here and (not job or not site.join.jobs or job in site.join.jobs)
            )

    def allows(self, site: str, kind: str) -> bool:
        """Whether a site said that it takes tasks of a kind."""
        with self._changed:
            return kind in self._sites[site].join.allow

    def arrivals(self, site: str) -> int:
        """Return how many processes of a site have presented themselves: a new one knows nothing of the last one's."""
        with self._changed:
            return self._arrivals[site]

    def wait_for(
        self,
        job: str,
        wanted: Sequence[str],
        *,
        least: int,
        deadline_s: float,
        gather_s: float = GATHER_S,
        check: Callable[[], None],
    ) -> tuple[str, ...]:
        """Wait until enough sites are here, and a little longer for the rest of them.

        Parameters
        ----------
        job : str
        wanted : sequence of str
        least : int
            How many of them are enough.
        deadline_s, gather_s : float
            Seconds to wait for these, and for the rest then.
        check : callable
            Called now and then; what it raises ends the waiting.

        Raises
        ------
        FederationError
            Naming who is missing when the deadline has passed.
        """
        began, enough_since, said = time.monotonic(), None, 0.0
        while True:
            check()
            here = tuple(name for name in self.sites(job) if name in wanted)
            now = time.monotonic()
            missing = ", ".join(name for name in wanted if name not in here)
            enough_since = (enough_since or now) if len(here) >= least else None
            if not missing or (enough_since is not None and now - enough_since >= gather_s):
                return here
            if now - began >= deadline_s and enough_since is None:
                raise FederationError(
                    f"job {job}: {len(here)} of {len(wanted)} sites are here after {deadline_s:.0f} s, "
                    f"{least} are needed; missing: {missing}; start them, or lower federation.min_sites"
                )
            if now - said >= SAY_EVERY_S:
                said = now
                log.info("waiting for sites job=%s here=%d needed=%d missing=%s", job, len(here), least, missing)
            with self._changed:
                self._changed.wait(LOOK_EVERY_S)
