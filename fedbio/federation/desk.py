"""The server's desk: which tasks are out, and which answers have come.

Transport threads report to the desk (`connected`, `joined`, `answered`); a controller asks it (`ask`) and waits. A
task is pushed to each site at once, and again when a site comes back before it has answered. A site's answer to a
task counts once, if it was asked and if the answer is what was expected; anything else is refused, as an event.
"""

from __future__ import annotations

__all__ = ["Desk", "Post"]

import collections
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from fedbio.errors import FedbioError, FederationError, PeerUnreachable, ProtocolError, TransportError
from fedbio.federation.acceptance import Expectation
from fedbio.federation.attendance import SAY_EVERY_S, Attendance
from fedbio.federation.messages import Join
from fedbio.federation.model import WEIGHT, Result, Status, Task, encode
from fedbio.federation.model_file import FileModel, ModelFilePayload
from fedbio.federation.open_task import OpenTask
from fedbio.federation.quantization import EXACT, Packer, Travel
from fedbio.federation.said import plain
from fedbio.results import EventLog
from fedbio.transport import Payload
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

SENDERS = 16
"""The most sites that are sent to at the same time."""

RETRY_S = 1.0
"""Seconds until a task is sent again to a site that is still here."""

SEND_TRIES = 3
"""How often a task is sent to a site that does not accept it."""

REMEMBERED_TASKS = 1000
"""Tasks that are over and of which the desk still knows the job, for an answer that comes late."""

REFUSALS_NOTED = 1_000
"""Refused results of a site that are written down while the server runs."""

MISSING_CHARACTERS = 12_000
"""The most that an error says of the sites that have not answered; events say all of it."""

Post = Callable[[str, bytes, Payload | None], None]
"""Sends a task to a site: its name, the body, the payload; blocks until the site has it all, or raises."""


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
        self._open: dict[str, OpenTask] = {}
        self._over: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()
        """What events say of tasks, by id; the newest ones."""
        self._changed = threading.Condition(threading.RLock())
        self.attendance = Attendance(self.expected, events, self._changed)
        self._interrupted: dict[str, FedbioError] = {}
        self._refusals: dict[str, int] = {}
        """How many results of a site were refused."""
        self._senders = Workers("push", most=SENDERS)
        self._packer = Packer()

    def close(self) -> None:
        """Stop sending."""
        self._senders.close()

    # what the transport reports

    def joined(self, site: str, join: Join) -> None:
        """A site's process has presented itself; push it whatever it still has to answer."""
        with self._changed:
            self.attendance.joined(site, join)
            for each in self._open.values():
                each.delivered.discard(site)
        self._push_open(site)

    def lost(self, site: str) -> None:
        """A site's connection has ended or fallen silent; its process may come back."""
        self.attendance.leaves(site, lost=True)

    def back(self, site: str) -> None:
        """The same process is here again; what was under way to it goes on by itself."""
        if self.attendance.back(site):
            self._push_open(site)

    def gone(self, site: str) -> None:
        """A site's process has left, or was not back in time."""
        self.attendance.leaves(site, lost=False)

    def _push_open(self, site: str) -> None:
        with self._changed:
            waiting = [each for each in self._open.values() if site in each.pending]
        for each in waiting:
            self._push(site, each)

    def schemes(self, site: str, task: str) -> Collection[str]:
        """Return the quantization schemes in which a site's answer to a task may come."""
        with self._changed:
            open_task = self._open.get(task)
            agreed = open_task.task.answer_scheme if open_task and site in open_task.pending else None
            return () if agreed is None else (agreed,)

    def room(self, site: str, task: str = "") -> int:
        """Return the most bytes of tensors that a site's answer to a task, or to any of its tasks, may have."""
        with self._changed:
            waiting = [each for each in self._open.values() if site in each.pending and task in ("", each.task.id)]
            return max((each.expected.room for each in waiting), default=0)

    def expecting(self, result: Result) -> Expectation:
        """Return what a result must be whose parameters are about to come; `ProtocolError` if nobody waits for it."""
        with self._changed:
            return self._waiting(result).expected

    def _waiting(self, result: Result) -> OpenTask:
        open_task = self._open.get(result.task)
        if open_task is not None and result.site in open_task.pending:
            return open_task
        reason = "its task is not open"
        if open_task is not None:
            known = result.site in open_task.results or result.site in open_task.lost
            reason = "it has answered already" if known else "it was not asked"
        self._refuse(result, reason)
        raise ProtocolError(f"the result is refused: {reason}")

    def answered(self, result: Result, *, size: int = 0, digest: bytes = b"") -> None:
        """A site has sent a result.

        Parameters
        ----------
        result : Result
            Its `site` comes from the sender's certificate.
        size : int
            Bytes of the message.
        digest : bytes
            BLAKE3 of its payload as it travelled; empty if nobody has computed it.
        """
        with self._changed:
            try:
                open_task = self._waiting(result)
            except ProtocolError:
                return
        # outside the lock: it looks at every number
        problem = open_task.expected.problem(result)
        if problem is not None:
            problem = plain(problem)  # it may quote names that the site has chosen
        with self._changed:
            if result.site not in open_task.pending:
                self._refuse(result, "it has answered already")
                return
            if result.task not in self._open:
                self._refuse(result, "its task is not open")
                return
            open_task.pending.discard(result.site)
            if problem is not None:
                open_task.lost[result.site] = f"its result was refused: {problem}"
                self._refuse(result, problem)
            elif result.status is Status.DONE:
                open_task.results[result.site] = result
                weight = result.model.weight if WEIGHT in result.model.meta else None
                self._events.write(
                    "result accepted", site=result.site, **open_task.named(),
                    weight=weight, bytes=size, digest=digest.hex() or None,
                )  # fmt: skip
            else:
                open_task.lost[result.site] = f"{result.status}: {result.reason}"
                lines = "".join(f"\n  {line}" for line in result.last_lines)
                log.warning(
                    "task %s site=%s task=%s reason=%s%s",
                    result.status, result.site, open_task.task.name, result.reason, lines,
                )  # fmt: skip
                more = {"last_lines": result.last_lines} if result.last_lines else {}
                self._events.write(
                    f"task {result.status}", site=result.site, **open_task.named(), reason=result.reason, **more
                )
            self._changed.notify_all()

    def unreadable(self, site: str, reason: str, task: str = "") -> None:
        """A site has sent something that is no result; it loses that task, or all of its if nobody can say which."""
        reason = plain(reason)
        with self._changed:
            lost = [each for each in self._open.values() if site in each.pending and (not task or each.task.id == task)]
            for each in lost:
                each.pending.discard(site)
                each.lost[site] = f"its result was refused: {reason}"
                self._note_refused(site, each.named(), reason)
            if not lost:
                self._note_refused(site, self._named(task), reason)
            self._changed.notify_all()

    def _refuse(self, result: Result, reason: str) -> None:
        self._note_refused(result.site, self._named(result.task), reason)

    def _note_refused(self, site: str, named: Mapping[str, Any], reason: str) -> None:
        """Write a refusal down; a site that goes on and on fills no disk."""
        count = self._refusals[site] = self._refusals.get(site, 0) + 1
        if count <= REFUSALS_NOTED:
            log.warning("result refused site=%s task=%s reason=%s", site, named["task"], reason)
            self._events.write("result refused", site=site, **named, reason=reason)
        if count == REFUSALS_NOTED:
            log.warning("further refused results are not noted site=%s after=%d", site, count)

    def _named(self, task: str) -> dict[str, Any]:
        """Return what events say of a task, which may be over, or none that ever was."""
        open_task = self._open.get(task)
        return open_task.named() if open_task else self._over.get(task, {"task": task[:100]})

    # what a controller asks

    def interrupt(self, job: str, error: FedbioError) -> None:
        """Have whoever waits here for a job, now or later, get an error."""
        with self._changed:
            self._interrupted[job] = error
            self._changed.notify_all()

    def check(self, job: str) -> None:
        """Raise what a job was interrupted with."""
        with self._changed:
            self._check(job)

    def _check(self, job: str) -> None:
        if job in self._interrupted:
            raise self._interrupted[job]

    def ask(
        self,
        task: Task,
        sites: Sequence[str],
        expected: Expectation,
        *,
        min_responses: int,
        deadline_s: float,
        travel: Travel = EXACT,
        on_result: Callable[[Result], None] | None = None,
        missing: dict[str, str] | None = None,
    ) -> list[Result]:
        """Hand a task to sites and wait until all have answered, or for enough of them until the deadline.

        Parameters
        ----------
        on_result : callable, optional
            Called on the caller's thread with each accepted result when it has come; what it raises ends the task.
        missing : dict of str to str, optional
            Filled with the sites that have given no result, and why.

        Returns
        -------
        list of Result
            Accepted results, sorted by site.

        Raises
        ------
        FederationError
            If fewer than `min_responses` can be had; it names every site that is missing, and why.
        FormatError
            If the scheme in which the model shall travel cannot hold it.
        """
        task = msgspec.structs.replace(task, answer_scheme=travel.to_server, feedback=travel.feedback)
        body, tensors = encode(task)
        # one payload for all sites: it is laid out, quantized and digested once
        payload: Payload | None
        if isinstance(task.model, FileModel):
            payload = ModelFilePayload(tensors, task.model.file)
        else:
            payload = self._packer.pack(tensors, travel.to_sites, exact=travel.exact, feedback=travel.feedback)
        open_task = OpenTask(task, body, payload, expected, set(sites))
        with self._changed:
            self._open[task.id] = open_task
        self._events.write("task sent", **open_task.named(), sites=list(sites))
        for site in sites:
            if self.attendance.is_here(site):
                self._push(site, open_task)
        try:
            self._wait(open_task, min_responses, deadline_s, on_result)
        finally:
            with self._changed:
                self._open.pop(task.id, None)
                self._over[task.id] = open_task.named()
                while len(self._over) > REMEMBERED_TASKS:
                    self._over.popitem(last=False)
            if payload is not None:
                payload.cancel()  # who has not had all of it yet is not waited for any more
        results = [open_task.results[site] for site in sorted(open_task.results)]
        why = self._why_missing(open_task)
        digest = payload.known_digest() if payload is not None else None
        self._events.write(
            "task closed",
            **open_task.named(),
            digest=digest.hex() if digest else None,
            answered=[each.site for each in results],
            missing=why,
        )
        if missing is not None:
            missing.update(why)
        if len(results) < min_responses:
            raise FederationError(
                f"job {task.job}: task {task.name} of round {task.model.current_round}: {len(results)} of {len(sites)} "
                f"sites have answered, {min_responses} are needed; "
                + plain("; ".join(f"{site}: {text}" for site, text in why.items()), MISSING_CHARACTERS)
            )
        return results

    def _wait(
        self,
        open_task: OpenTask,
        min_responses: int,
        deadline_s: float,
        on_result: Callable[[Result], None] | None,
    ) -> None:
        began = said = time.monotonic()
        told: set[str] = set()
        while True:
            with self._changed:
                if open_task.bug is not None:
                    raise open_task.bug
                self._check(open_task.task.job)
                now = time.monotonic()
                left = began + deadline_s - now
                fresh = [open_task.results[site] for site in open_task.results if site not in told]
                over = (
                    not open_task.pending
                    or left <= 0
                    or len(open_task.results) + len(open_task.pending) < min_responses
                )
                if over:
                    # a result that comes from here on is late, whatever `on_result` does meanwhile
                    del self._open[open_task.task.id]
                elif on_result is None or not fresh:
                    gone = [site for site in sorted(open_task.pending) if not self.attendance.is_here(site)]
                    if gone and now - said >= SAY_EVERY_S:
                        said = now
                        log.info(
                            "waiting for sites that are gone task=%s round=%d missing=%s seconds_left=%.0f",
                            open_task.task.name, open_task.task.model.current_round, ",".join(gone), left,
                        )  # fmt: skip
                    self._changed.wait(min(left, 1.0))
                    continue
            # outside the lock: answers of other sites are taken meanwhile
            for result in fresh:
                told.add(result.site)
                if on_result is not None:
                    on_result(result)
            if over:
                return

    def _why_missing(self, open_task: OpenTask) -> Mapping[str, str]:
        """Return who has not given a result and why; those who failed come before those who are only late."""
        with self._changed:
            silent = {
                site: "has not answered"
                if self.attendance.is_here(site)
                else f"is gone since {self.attendance.seconds_away(site):.0f} s"
                for site in sorted(open_task.pending)
            }
            return {**dict(sorted(open_task.lost.items())), **silent}

    def _push(self, site: str, open_task: OpenTask) -> None:
        with self._changed:
            if site in open_task.delivering or site in open_task.delivered:
                return
            open_task.delivering.add(site)

        def push() -> None:
            try:
                self._deliver(site, open_task)
            except Exception as bug:
                # raised where someone can see it: in the controller that waits
                with self._changed:
                    open_task.bug = bug
                    self._changed.notify_all()

        self._senders.submit(push)

    def _deliver(self, site: str, open_task: OpenTask) -> None:
        """Send a task until the site has it; who is not here is sent it when it is here again."""
        process, refusals = self.attendance.arrivals(site), 0
        while True:
            sent = False
            try:
                self._post(site, open_task.body, open_task.payload)
                sent = True
            except TransportError as error:
                log.info("task not delivered site=%s task=%s reason=%s", site, open_task.task.name, error)
                refusals += not isinstance(error, PeerUnreachable)
                if refusals >= SEND_TRIES:
                    self._lose(site, open_task, str(error).removeprefix(f"{site}: "))
            with self._changed:
                if not sent and self.attendance.arrivals(site) == process:
                    self._changed.wait_for(lambda: self._is_settled(site, open_task), RETRY_S)
                same = self.attendance.arrivals(site) == process
                process = self.attendance.arrivals(site)
                if (sent and same) or self._is_settled(site, open_task):
                    if sent and same:
                        open_task.delivered.add(site)
                    open_task.delivering.discard(site)
                    return

    def _lose(self, site: str, open_task: OpenTask, reason: str) -> None:
        """A site is here and does not take a task."""
        with self._changed:
            if site in open_task.pending:
                open_task.pending.discard(site)
                open_task.lost[site] = reason
                self._events.write("task not taken", site=site, **open_task.named(), reason=reason)
                self._changed.notify_all()

    def _is_settled(self, site: str, open_task: OpenTask) -> bool:
        """Whether there is no more to send, or nobody to send it to."""
        waits = site in open_task.pending and open_task.task.id in self._open
        return not waits or not self.attendance.is_here(site)
