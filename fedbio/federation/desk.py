"""The server's desk: who is here, which tasks are out, and which answers have come.

Transport threads report to the desk (`connected`, `joined`, `answered`); a controller asks it (`ask`) and waits. A
task is pushed to each site at once, and again when a site comes back before it has answered. A site's answer to a
task counts once, if it was asked and if the answer is what was expected; anything else is refused, as an event.
"""

from __future__ import annotations

__all__ = ["Desk", "Post"]

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedbio.errors import FederationError, TransportError
from fedbio.federation.acceptance import Expectation
from fedbio.federation.messages import Join
from fedbio.federation.model import Result, Status, Task, encode
from fedbio.results import EventLog
from fedbio.transport import Payload, TensorPayload
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

SAY_EVERY_S = 10.0
"""Seconds between two lines that say who is waited for."""

GATHER_S = 10.0
"""Once enough sites are here, seconds in which the other expected ones may still come before a job begins."""

SENDERS = 16
"""The most sites that are sent to at the same time."""

RETRY_S = 1.0
"""Seconds until a task is sent again to a site that is still here."""

Post = Callable[[str, bytes, Payload | None], None]
"""Sends a task to a site: its name, the body, the payload; blocks until the site has it all, or raises."""


@dataclass(slots=True)
class _Presence:
    here: bool = False
    since: float = field(default_factory=time.monotonic)
    join: Join = field(default_factory=lambda: Join(version=""))


@dataclass(slots=True)
class _OpenTask:
    task: Task
    body: bytes
    payload: Payload | None
    expected: Expectation
    pending: set[str]
    results: dict[str, Result] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class Desk:
    """Keeps track of sites and open tasks.

    Parameters
    ----------
    expected : sequence of str
        The sites that take part.
    post : callable
        How to send to a site.
    events : EventLog
    min_sites : int or None
        How many results a task needs after its deadline; None means one from every site asked.
    """

    def __init__(self, expected: Sequence[str], post: Post, events: EventLog, *, min_sites: int | None = None) -> None:
        self.expected = tuple(sorted(expected))
        self.min_sites = min_sites
        self._post, self._events = post, events
        self._sites = {name: _Presence() for name in self.expected}
        self._open: dict[str, _OpenTask] = {}
        self._changed = threading.Condition()
        self._bug: BaseException | None = None
        self._senders = Workers("push", most=SENDERS)

    def close(self) -> None:
        """Stop sending."""
        self._senders.close()

    # what the transport reports

    def joined(self, site: str, join: Join) -> None:
        """A site has presented itself; push it whatever it still has to answer."""
        with self._changed:
            self._sites[site] = _Presence(here=True, join=join)
            waiting = [each for each in self._open.values() if site in each.pending]
            self._changed.notify_all()
        self._events.write("site joined", site=site, version=join.version)
        log.info("site joined site=%s", site)
        for each in waiting:
            self._push(site, each)

    def gone(self, site: str) -> None:
        """A site's connection has ended or fallen silent."""
        with self._changed:
            if site not in self._sites or not self._sites[site].here:
                return
            self._sites[site] = _Presence(here=False, join=self._sites[site].join)
            self._changed.notify_all()
        self._events.write("site gone", site=site)
        log.info("site gone site=%s", site)

    def answered(self, result: Result) -> None:
        """A site has sent a result; `result.site` comes from its certificate."""
        with self._changed:
            open_task = self._open.get(result.task)
            if open_task is None:
                self._refuse(result, "its task is not open")
                return
            known = result.site in open_task.results or result.site in open_task.lost
            if result.site not in open_task.pending:
                self._refuse(result, "it has answered already" if known else "it was not asked")
                return
        # outside the lock: it looks at every number
        problem = open_task.expected.problem(result)
        with self._changed:
            if result.site not in open_task.pending:
                self._refuse(result, "it has answered already")
                return
            open_task.pending.discard(result.site)
            if problem is not None:
                open_task.lost[result.site] = f"its result was refused: {problem}"
                self._refuse(result, problem)
            elif result.status is Status.DONE:
                open_task.results[result.site] = result
            else:
                open_task.lost[result.site] = f"{result.status}: {result.reason}"
                log.warning(
                    "task %s site=%s task=%s reason=%s", result.status, result.site, open_task.task.name, result.reason
                )
                self._events.write(
                    f"task {result.status}", site=result.site, task=open_task.task.name, reason=result.reason
                )
            self._changed.notify_all()

    def unreadable(self, site: str, reason: str) -> None:
        """A site has sent something that is no result; it loses the task that it was working on."""
        with self._changed:
            log.warning("result refused site=%s reason=%s", site, reason)
            self._events.write("result refused", site=site, reason=reason)
            for each in self._open.values():
                if site in each.pending:
                    each.pending.discard(site)
                    each.lost[site] = f"its result was refused: {reason}"
            self._changed.notify_all()

    def _refuse(self, result: Result, reason: str) -> None:
        log.warning("result refused site=%s task=%s reason=%s", result.site, result.task, reason)
        self._events.write("result refused", site=result.site, task=result.task, reason=reason)

    # what a controller asks

    def sites(self, job: str = "") -> tuple[str, ...]:
        """Return the sites that are here and take part in a job, sorted by name."""
        with self._changed:
            return tuple(name for name, site in self._sites.items() if site.here and _takes(site, job))

    def allows(self, site: str, kind: str) -> bool:
        """Whether a site said that it takes tasks of a kind."""
        with self._changed:
            return kind in self._sites[site].join.allow

    def needed(self, asked: int) -> int:
        """Return how many of `asked` sites have to answer."""
        return asked if self.min_sites is None else min(self.min_sites, asked)

    def wait_for_sites(self, job: str, *, deadline_s: float, gather_s: float = GATHER_S) -> tuple[str, ...]:
        """Wait until enough sites are here, and a little longer for the rest of them.

        Raises
        ------
        FederationError
            Naming who is missing when the deadline has passed.
        """
        least = len(self.expected) if self.min_sites is None else self.min_sites
        began, enough_since, said = time.monotonic(), None, 0.0
        while True:
            here = self.sites(job)
            now = time.monotonic()
            missing = ", ".join(name for name in self.expected if name not in here)
            enough_since = (enough_since or now) if len(here) >= least else None
            if not missing or (enough_since is not None and now - enough_since >= gather_s):
                return here
            if now - began >= deadline_s and enough_since is None:
                raise FederationError(
                    f"job {job}: {len(here)} of {len(self.expected)} sites are here after {deadline_s:.0f} s, "
                    f"{least} are needed; missing: {missing}; start them, or lower federation.min_sites"
                )
            if now - said >= SAY_EVERY_S:
                said = now
                log.info("waiting for sites job=%s here=%d needed=%d missing=%s", job, len(here), least, missing)
            with self._changed:
                self._changed.wait(0.2)

    def ask(
        self, task: Task, sites: Sequence[str], expected: Expectation, *, min_responses: int, deadline_s: float
    ) -> list[Result]:
        """Hand a task to sites and wait until all have answered, or for enough of them until the deadline.

        Returns
        -------
        list of Result
            Accepted results, sorted by site.

        Raises
        ------
        FederationError
            If fewer than `min_responses` can be had; it names every site that is missing, and why.
        """
        body, tensors = encode(task)
        # one payload for all sites: it is laid out and digested once
        open_task = _OpenTask(task, body, TensorPayload(tensors) if tensors else None, expected, set(sites))
        with self._changed:
            self._open[task.id] = open_task
        self._events.write(
            "task sent", task=task.name, id=task.id, job=task.job, round=task.model.current_round, sites=list(sites)
        )
        for site in sites:
            if self._is_here(site):
                self._push(site, open_task)
        try:
            self._wait(open_task, min_responses, deadline_s)
        finally:
            with self._changed:
                del self._open[task.id]
        results = [open_task.results[site] for site in sorted(open_task.results)]
        why = self._why_missing(open_task)
        self._events.write(
            "task closed", task=task.name, id=task.id, answered=[each.site for each in results], missing=why
        )
        if len(results) < min_responses:
            raise FederationError(
                f"job {task.job}: task {task.name} of round {task.model.current_round}: {len(results)} of {len(sites)} "
                f"sites have answered, {min_responses} are needed; "
                + "; ".join(f"{site}: {text}" for site, text in why.items())
            )
        return results

    def _wait(self, open_task: _OpenTask, min_responses: int, deadline_s: float) -> None:
        began = said = time.monotonic()
        with self._changed:
            while open_task.pending:
                if self._bug is not None:
                    raise self._bug
                now = time.monotonic()
                left = began + deadline_s - now
                if left <= 0 or len(open_task.results) + len(open_task.pending) < min_responses:
                    return
                gone = [site for site in sorted(open_task.pending) if not self._sites[site].here]
                if gone and now - said >= SAY_EVERY_S:
                    said = now
                    log.info(
                        "waiting for sites that are gone task=%s round=%d missing=%s seconds_left=%.0f",
                        open_task.task.name, open_task.task.model.current_round, ",".join(gone), left,
                    )  # fmt: skip
                self._changed.wait(min(left, 1.0))

    def _why_missing(self, open_task: _OpenTask) -> Mapping[str, str]:
        """Return who has not given a result and why; those who failed come before those who are only late."""
        with self._changed:
            silent = {
                site: "has not answered"
                if self._sites[site].here
                else f"is gone since {time.monotonic() - self._sites[site].since:.0f} s"
                for site in sorted(open_task.pending)
            }
            return {**dict(sorted(open_task.lost.items())), **silent}

    def _is_here(self, site: str) -> bool:
        with self._changed:
            return self._sites[site].here

    def _push(self, site: str, open_task: _OpenTask) -> None:
        def push() -> None:
            try:
                self._deliver(site, open_task)
            except Exception as bug:
                # raised where someone can see it: in the controller that waits
                with self._changed:
                    self._bug = bug
                    self._changed.notify_all()

        self._senders.submit(push)

    def _deliver(self, site: str, open_task: _OpenTask) -> None:
        with self._changed:
            presence = self._sites[site]

        def is_over() -> bool:
            # a site that has gone is pushed the task when it joins again
            waits = site in open_task.pending and open_task.task.id in self._open
            return not waits or self._sites[site] is not presence

        while True:
            try:
                return self._post(site, open_task.body, open_task.payload)
            except TransportError as error:
                log.info("task not delivered site=%s task=%s reason=%s", site, open_task.task.name, error)
            with self._changed:
                if self._changed.wait_for(is_over, RETRY_S):
                    return None


def _takes(site: _Presence, job: str) -> bool:
    return not job or not site.join.jobs or job in site.join.jobs
