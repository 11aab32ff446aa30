"""Swarm learning: sites take turns in aggregating, and the server passes on what it cannot read.

Warnat-Herresthal et al. 2021, "Swarm Learning for decentralized and confidential clinical machine learning". There, a
blockchain agrees on the site that merges; here the server draws it, and only draws it.
"""

from __future__ import annotations

__all__ = ["Swarm"]

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FederationError, ProtocolError
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.model import Result
from fedbio.federation.workflows.selection import is_better, mean_metric
from fedbio.federation.workflows.swarm_checks import answer_of, sealed_bytes
from fedbio.federation.workflows.swarm_members import SLACK_BYTES, Course, Meeting, Name, SwarmMembers
from fedbio.federation.workflows.swarm_words import AGGREGATE, EVALUATE, FINISH, TRAIN, UPDATE, Answered

log = logging.getLogger(__name__)

TRIES = 3
"""How often a round is begun anew for reasons that are not the aggregating site's."""

Update = np.ndarray[Any, Any] | str | None
"""Sealed bytes, or why there are none; None if they stay where they are."""


class Swarm(SwarmMembers):
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
        metric = self.settings.selection.metric
        value = mean_metric(metric, results, self.deployment.examples)
        if is_better(self.settings.selection, value, self.course.best_value):
            self.course.best, self.course.best_value = model, value
        self.course.measured = model[0]
        self.save()
        self.runtime.events.write("round", job=self.job, round=model[0], metric=metric, value=value)

    def measure_last(self, meeting: Meeting, model: Name) -> None:
        """Have the sites measure the last model, which is not trained any more; a script need not be able to."""
        errand = self.errand(meeting, model, metric=self.settings.selection.metric)
        self.measure(model, self.broadcast_and_wait(EVALUATE, errand, sorted(meeting.held), min_responses=0))
