"""Swarm learning: sites take turns in aggregating, and the server passes on what it cannot read.

Warnat-Herresthal et al. 2021, "Swarm Learning for decentralized and confidential clinical machine learning". There, a
blockchain agrees on the site that merges; here the server draws it, and only draws it.
"""

from __future__ import annotations

__all__ = ["Swarm"]

import logging
import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FederationError, ProtocolError, SettingsError
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Parameters, Result
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.fedavg import TIE
from fedbio.federation.workflows.study import meta
from fedbio.federation.workflows.swarm_checks import answer_of, sealed_bytes, sealed_model
from fedbio.federation.workflows.swarm_words import (
    ADOPT,
    AGGREGATE,
    BEGIN,
    EVALUATE,
    FINISH,
    MAX_INTRODUCTION_BYTES,
    MEET,
    MODEL,
    SHARE,
    TRAIN,
    UPDATE,
    Aggregated,
    Answered,
    Errand,
    Met,
)
from fedbio.settings_jobs import SwarmJob

log = logging.getLogger(__name__)

TRIES = 3
"""How often a round is begun anew for reasons that are not the aggregating site's."""

SLACK_BYTES = 1 << 20
"""By how much an update may be longer than a model: names in another order, a mean in another dtype."""

Name = tuple[int, int]
"""A model's round, and the exchange in which it was made."""

Update = np.ndarray[Any, Any] | str | None
"""Sealed bytes, or why there are none; None if they stay where they are."""


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


class Swarm(Controller):
    """In each round, sites train, a site that is drawn averages what the others seal for it, and all get the mean.

    What the server learns: who is here, sizes, rounds, and the metric of the job's selection. Best and last model are
    kept at each site, as ``swarm/JOB/best.safetensors`` and ``last.safetensors``.

    The server holds the sealed updates of one round in memory, or in spool files beyond the transport's limit: as many
    models as there are sites but one, and afterwards one model.

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

    def run(self) -> Course:
        """Train until the rounds are over; have the sites keep the best and the last model."""
        self.save()
        while True:
            meeting = self.meet()
            model = self.provide_last(meeting)
            if model[0] >= self.rounds:
                break
            self.do_round(meeting, model)
        self.measure_last(meeting, model)
        best = self.course.best or model
        self.provide(meeting, best)
        self.broadcast_and_wait(FINISH, self.errand(meeting, model, best=best), sorted(meeting.held))
        self.deployment.end()
        return self.course

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

    # one round

    def do_round(self, meeting: Meeting, model: Name) -> None:
        """Train and aggregate; if the site that aggregates fails, another one does it, with fresh keys for all."""
        problems: list[str] = []
        failed: set[str] = set()
        for _ in range(max(TRIES, len(self.deployment.examples))):
            turns = self.turns(model[0], meeting)
            aggregator = next((site for site in turns if site not in failed), turns[0])
            log.info("round begins job=%s round=%d aggregator=%s", self.job, model[0], aggregator)
            self.runtime.events.write("aggregator drawn", job=self.job, round=model[0], site=aggregator)
            updates = self.train(meeting, model, aggregator)
            try:
                return self.aggregate(meeting, model, aggregator, updates)
            except (FederationError, ProtocolError) as error:
                problem = str(error)
            self.runtime.events.write("exchange failed", job=self.job, round=model[0], site=aggregator, reason=problem)
            log.warning("exchange failed job=%s round=%d reason=%s", self.job, model[0], problem)
            problems.append(f"{aggregator}: {problem}")
            failed.add(aggregator)
            meeting = self.meet()
            self.provide(meeting, model)
        raise FederationError(
            f"job {self.job}: no site could aggregate round {model[0]}, and nobody is left to try; "
            + "; ".join(problems)
        )

    def train(self, meeting: Meeting, model: Name, aggregator: str) -> dict[str, Update]:
        """Have all sites train; return what each has sealed for the aggregator, or why there is nothing."""
        errand = self.errand(
            meeting, model, site=aggregator, introduced=[aggregator], metric=self.settings.selection.metric
        )
        results = self.broadcast_and_wait(TRAIN, errand, sorted(meeting.held), expect=ANY_TENSORS)
        updates: dict[str, Update] = {}
        for each in results:
            answer = answer_of(each, Answered)
            try:
                if answer is None or answer.problem:
                    raise ProtocolError("its answer is not one" if answer is None else answer.problem)
                own = each.site == aggregator
                updates[each.site] = None if own else sealed_bytes(each, UPDATE, self.course.model_bytes + SLACK_BYTES)
            except ProtocolError as error:
                updates[each.site] = str(error)
                self.refuse(each.site, str(error))
        self.measure(model, results)
        return updates

    def aggregate(self, meeting: Meeting, model: Name, aggregator: str, updates: Mapping[str, Update]) -> None:
        """Pass the updates on to the site that aggregates, and its model to all.

        Raises
        ------
        FederationError, ProtocolError
            If that is not possible; another site may do it.
        """
        least = self.runtime.desk.needed(len(meeting.held))
        problems = [f"{site}: {found}" for site, found in updates.items() if isinstance(found, str)]
        if aggregator not in updates or len(updates) - len(problems) < least:
            raise FederationError("; ".join(problems) or f"{aggregator} has not trained")
        sealed_updates = {f"{UPDATE}/{site}": found for site, found in updates.items() if isinstance(found, np.ndarray)}
        others = sorted(site for site in meeting.held if site != aggregator)
        errand = self.errand(meeting, model, introduced=others, least=least)
        [result] = self.broadcast_and_wait(
            AGGREGATE,
            msgspec.structs.replace(errand, params=sealed_updates),
            [aggregator],
            min_responses=1,
            expect=ANY_TENSORS,
        )
        sealed = self.checked(result, others)
        self.note_refused(result)
        name = (model[0] + 1, meeting.exchange)
        # before anyone adopts it: a server that starts again must know that this one counts
        self.course.offered = name
        self.save()
        # a site that misses it is provided with it in the next exchange
        self.hand_out(meeting, name, aggregator, {}, [aggregator])
        self.hand_out(meeting, name, aggregator, sealed, others)
        if not any(name in held for held in meeting.held.values()):
            raise FederationError(f"no site has adopted the model that {aggregator} made")
        self.settle(name)

    # selection

    def measure(self, model: Name, results: Sequence[Result]) -> None:
        """Compare a model that the sites have measured with the best one so far."""
        if self.course.measured >= model[0]:
            return
        metric, counts = self.settings.selection.metric, self.deployment.examples
        measured = [(each.model.metrics[metric], counts[each.site]) for each in results if metric in each.model.metrics]
        total = sum(count for _, count in measured)
        value = sum(found * count for found, count in measured) / total if total else None
        if self.is_better(value):
            self.course.best, self.course.best_value = model, value
        self.course.measured = model[0]
        self.save()
        self.runtime.events.write("round", job=self.job, round=model[0], metric=metric, value=value)

    def is_better(self, value: float | None) -> bool:
        """Whether a model takes the place of the best one so far; one that nobody measured follows only its like."""
        selection, best = self.settings.selection, self.course.best_value
        if value is None or best is None:
            return best is None
        gain = value - best if selection.best == "highest" else best - value
        return gain > TIE or (selection.ties == "last" and gain >= -TIE)

    def measure_last(self, meeting: Meeting, model: Name) -> None:
        """Have the sites measure the last model, which is not trained any more; a script need not be able to."""
        errand = self.errand(meeting, model, metric=self.settings.selection.metric)
        self.measure(model, self.broadcast_and_wait(EVALUATE, errand, sorted(meeting.held), min_responses=0))

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
