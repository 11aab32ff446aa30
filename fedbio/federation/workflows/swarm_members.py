"""Who takes part in a swarm's exchange, which models each site holds, and how one that lacks a model gets it.

The server knows models by their names only: it has sites seal them for each other, and passes on what it cannot read.
"""

from __future__ import annotations

__all__ = ["Course", "Meeting", "Name", "SwarmMembers"]

import logging
import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fedbio.errors import FederationError, ProtocolError, SettingsError
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Parameters, Result
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.study import meta
from fedbio.federation.workflows.swarm_checks import answer_of, sealed_model
from fedbio.federation.workflows.swarm_words import (
    ADOPT,
    BEGIN,
    MAX_INTRODUCTION_BYTES,
    MEET,
    MODEL,
    SHARE,
    Aggregated,
    Errand,
    Met,
)
from fedbio.settings_jobs import SwarmJob

log = logging.getLogger(__name__)

SLACK_BYTES = 1 << 20
"""By how much an update may be longer than a model: names in another order, a mean in another dtype."""

Name = tuple[int, int]
"""A model's round, and the exchange in which it was made."""


class Course(msgspec.Struct, kw_only=True):
    """What the server remembers of a run."""

    run: str
    exchange: int = 0
    """Number of the last exchange."""
    model: Name | None = None
    """The last model; None before there is one."""
    offered: Name | None = None
    """A model that sites were asked to adopt; some may have it already."""
    model_bytes: int = 0
    """Of the first model, sealed."""
    best: Name | None = None
    best_value: float | None = None
    measured: int = -1
    """The last round of which the metric is known."""


class Meeting(msgspec.Struct, frozen=True):
    """One exchange: its number, who is there, and what each holds."""

    exchange: int
    introductions: dict[str, bytes]
    held: dict[str, set[Name]]


class SwarmMembers(Controller):
    """Has sites meet, and sees to it that they hold the model that counts.

    Parameters
    ----------
    runtime : Runtime
    job : SwarmJob
    """

    def __init__(self, runtime: Runtime, job: SwarmJob) -> None:
        super().__init__(runtime)
        if runtime.outgoing.filters or runtime.incoming.filters:
            raise SettingsError(f"job {self.job}: the server cannot filter what it cannot read; take its filters out")
        if job.client.initial is None:
            raise SettingsError(
                f"job {self.job}: client.initial is missing; name a function of the script that returns the first model"
            )
        self.settings, self.rounds = job, job.rounds
        self.deployment = Deployment(self, job, job.rounds)
        self.course = self.state.noted(self.job, "swarm", Course) or Course(run=uuid.uuid4().hex)

    def save(self) -> None:
        """Note how far the run has come."""
        self.state.note(self.job, "swarm", self.course)

    # one exchange

    def meet(self) -> Meeting:
        """Have the sites make fresh keys and introduce themselves; learn which models they hold."""
        sites = self.deployment.sites()
        self.course.exchange += 1
        self.save()
        errand = Errand(run=self.course.run, exchange=self.course.exchange, examples=self.deployment.examples)
        introductions, held = {}, {}
        for result in self.broadcast_and_wait(MEET, FLModel(meta=meta(errand)), sites):
            met = answer_of(result, Met)
            if met is None or len(met.introduction) > MAX_INTRODUCTION_BYTES:
                self.refuse(result.site, "its introduction is not one")
                continue
            introductions[result.site] = met.introduction
            held[result.site] = set(met.held)
        return Meeting(self.course.exchange, introductions, held)

    def provide_last(self, meeting: Meeting) -> Name:
        """See to it that everyone holds the last model, which a site begins if there is none; return its name."""
        offered = self.course.offered
        if offered is not None and any(offered in held for held in meeting.held.values()):
            # the server was stopped while sites adopted it
            self.settle(offered)
        if self.course.model is None:
            return self.begin(meeting)
        self.provide(meeting, self.course.model)
        return self.course.model

    def begin(self, meeting: Meeting) -> Name:
        """Have the script of one site make the model of round 0."""
        name, failures = (0, meeting.exchange), []
        for site in self.turns(0, meeting):
            try:
                self.broadcast_and_wait(BEGIN, self.errand(meeting, name), [site], min_responses=1)
            except FederationError as error:
                failures.append(str(error))
                continue
            meeting.held[site].add(name)
            self.settle(name)
            self.provide(meeting, name)
            return name
        raise FederationError("; ".join(failures))

    def provide(self, meeting: Meeting, name: Name) -> None:
        """Have a site that holds a model seal it for those that lack it; they drop out if there is no way."""
        lacking = sorted(site for site, held in meeting.held.items() if name not in held)
        failures: list[str] = []
        for holder in self.turns(name[0], meeting):
            if not lacking or name not in meeting.held[holder]:
                continue
            try:
                [result] = self.broadcast_and_wait(
                    SHARE, self.errand(meeting, name, introduced=lacking), [holder], min_responses=1, expect=ANY_TENSORS
                )
                self.note_refused(result)
                lacking = self.hand_out(meeting, name, holder, self.checked(result, lacking), lacking)
            except (FederationError, ProtocolError) as error:
                failures.append(str(error))
        if lacking and len(meeting.held) - len(lacking) < self.runtime.desk.needed(len(meeting.held)):
            raise FederationError(
                f"job {self.job}: {', '.join(lacking)} cannot be given the model of round {name[0]}; "
                + ("; ".join(failures) or "no site that is here holds it")
            )
        for site in lacking:
            self.drop(meeting, site)

    def hand_out(
        self, meeting: Meeting, name: Name, maker: str, sealed: Parameters, receivers: Sequence[str]
    ) -> list[str]:
        """Pass a sealed model on to those it is sealed for; return who has not adopted it."""
        errand = self.errand(meeting, name, site=maker, introduced=[maker], keep=self.kept(name))
        missing: dict[str, str] = {}
        task = msgspec.structs.replace(errand, params=sealed)
        results = self.broadcast_and_wait(ADOPT, task, receivers, min_responses=0, missing=missing)
        for each in results:
            meeting.held[each.site].add(name)
        for site, why in missing.items():
            log.warning("model not adopted site=%s round=%d reason=%s", site, name[0], why)
        return sorted(missing)

    # what is said, and what comes back

    def errand(self, meeting: Meeting, name: Name, *, introduced: Sequence[str] = (), **more: Any) -> FLModel:
        """Return a task's content."""
        introductions = {site: meeting.introductions[site] for site in introduced}
        errand = Errand(
            run=self.course.run,
            exchange=meeting.exchange,
            round=name[0],
            tag=name[1],
            introductions=introductions,
            **more,
        )
        return FLModel(meta=meta(errand), current_round=name[0], total_rounds=self.rounds)

    def turns(self, number: int, meeting: Meeting) -> list[str]:
        """Return the sites of an exchange in the order in which they come to aggregate a round."""
        # of all sites: the order must not change with who is away
        order = sorted(self.deployment.examples)
        random.Random(f"{self.settings.seed} {number}").shuffle(order)
        return [site for site in order if site in meeting.held]

    def kept(self, name: Name) -> tuple[Name, ...]:
        """Return the models beside a new one that sites shall keep."""
        return tuple({each for each in (self.course.model, self.course.best) if each is not None and each != name})

    def settle(self, name: Name) -> None:
        """Let a model count."""
        self.course.model, self.course.offered = name, None
        self.save()

    def drop(self, meeting: Meeting, site: str) -> None:
        """Go on without a site until the next exchange."""
        self.runtime.events.write("site left out", job=self.job, site=site)
        del meeting.held[site], meeting.introductions[site]

    def checked(self, result: Result, receivers: Sequence[str]) -> Parameters:
        """Return a sealed model and its keys, once their sizes can be right."""
        known = self.course.model_bytes
        found = sealed_model(result, receivers, known + SLACK_BYTES if known else None)
        if not known:
            self.course.model_bytes = len(found[MODEL])
            self.save()
        return found

    def note_refused(self, result: Result) -> None:
        """Write whom a site refused, and why."""
        answer = answer_of(result, Aggregated)
        refused: Mapping[str, str] = {} if answer is None else answer.refused
        for site, reason in refused.items():
            self.runtime.events.write("update refused", job=self.job, site=site, by=result.site, reason=reason)
            log.warning("update refused site=%s by=%s reason=%s", site, result.site, reason)

    def refuse(self, site: str, reason: str) -> None:
        """Write why a site's answer does not count."""
        self.runtime.events.write("result refused", job=self.job, site=site, reason=reason)
        log.warning("result refused site=%s reason=%s", site, reason)
