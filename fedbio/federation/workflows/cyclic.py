"""Cyclic weight transfer: one model goes from site to site, and each trains it on its own data.

Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging", Journal of the American
Medical Informatics Association 25(8): 945-954. There is no mean: the model that a site gets is the one that the site
before it has trained, and after the last site the first one gets it again, for `rounds` times around.
"""

from __future__ import annotations

__all__ = ["Cyclic", "Visit"]

import logging
import shutil

import msgspec

from fedbio.errors import FormatError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Parameters, Result
from fedbio.federation.sampling import shuffle
from fedbio.federation.state import Progress
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.initial import initial_model
from fedbio.federation.workflows.script import TRAIN
from fedbio.federation.workflows.site_metrics import named_metrics
from fedbio.files import sha256_file, whole_file
from fedbio.results import Metric
from fedbio.settings_jobs import CyclicJob

log = logging.getLogger(__name__)

RUN = "model"
"""Name of the one run of a job; in the state its "rounds" are steps: how many sites have trained the model."""


class Visit(msgspec.Struct, frozen=True):
    """Where the model is on its way.

    Parameters
    ----------
    round : int
        Which time around it is, from 0.
    order : tuple of str
        The sites of this time around; empty before it has begun.
    place : int
        So many of them are behind it.
    answered : int
        So many of those have trained it; the others were skipped.
    """

    round: int = 0
    order: tuple[str, ...] = ()
    place: int = 0
    answered: int = 0


class Cyclic(Controller):
    """Hands one model around.

    A site that fails, is gone or is past the round's deadline is skipped, and a time around needs `min_sites` sites.
    The model is saved after every site, so that a server that was killed goes on with the next one and comes to the
    same bits. The model after each time around is kept as ``models/JOB/round-00001.safetensors``, ..., the last one
    also as ``last.safetensors``: rounds alone choose, since a metric of the site that has just trained says little
    about the others.

    Parameters
    ----------
    runtime : Runtime
    job : CyclicJob
    """

    def __init__(self, runtime: Runtime, job: CyclicJob) -> None:
        super().__init__(runtime)
        self.settings, self.rounds = job, job.rounds
        self.deployment = Deployment(self, job, job.rounds)
        self.folder = runtime.workspace / "models" / runtime.job
        self.step, self.visit = 0, Visit()
        self.params: Parameters = {}

    def run(self) -> Parameters:
        """Hand the model around until the rounds are over; return the last model."""
        self.load(self.deployment.sites())
        while self.visit.round < self.rounds:
            self.go_around()
        self.finish()
        return self.params

    def load(self, sites: list[str]) -> None:
        """Take up the model where it was saved last, or begin with a new one."""
        saved = self.state.progress(self.job, RUN)
        if saved is None:
            first = initial_model(
                self, file=self.settings.model, function=self.settings.client.initial, sites=sites, rounds=self.rounds
            )
            self.save(first, Visit())
            return
        visit = self.state.noted(self.job, _key(saved.round), Visit)
        if visit is None:
            raise FormatError(f"{self.state.folder}: where the model of job {self.job} is was lost; start in a new one")
        self.step, self.visit, self.params = saved.round, visit, self.state.model(self.job, RUN, saved.round)

    def go_around(self) -> None:
        """Hand the model to each site that has not had it this time."""
        sites = self.deployment.sites()
        if not self.visit.order:
            number = self.visit.round
            random = self.settings.order == "random"
            order = shuffle(sites, seed=self.settings.seed, number=number) if random else tuple(sorted(sites))
            # noted before the first site has it: a server that is killed meanwhile keeps to this order
            self.note(self.step, Visit(number, order))
        visit = self.visit
        self.relay(
            TRAIN,
            FLModel(params=self.params, current_round=visit.round, total_rounds=self.rounds),
            visit.order[visit.place :],
            min_responses=max(0, self.runtime.desk.needed(len(visit.order)) - visit.answered),
            weights=self.deployment.examples,
            on_result=self.trained,
        )
        self.keep(f"round-{visit.round + 1:05}")
        log.info("round finished job=%s round=%d sites=%d", self.job, visit.round, self.visit.answered)
        self.note(self.step, Visit(visit.round + 1))

    def trained(self, result: Result) -> None:
        """Save what a site has made of the model, before the next one gets it."""
        visit = self.visit
        self.state.add_metrics(
            self.job,
            [
                Metric(result.site, self.job, "train", 0, visit.round, name, value)
                for name, value in named_metrics(result.model.metrics).items()
            ],
        )
        place = visit.order.index(result.site) + 1
        self.save(result.model.params, Visit(visit.round, visit.order, place, visit.answered + 1), by=result.site)
        # a site that was started anew in the meantime has no script yet
        self.deployment.sites()

    def save(self, params: Parameters, visit: Visit, by: str | None = None) -> None:
        """Save the model and its place; killed at any moment, the state has both or neither."""
        step = 0 if by is None else self.step + 1
        # the row of progress, which comes last, says which of the notes counts
        self.note(step, visit)
        # sorted: neither the file's bytes nor what scripts get shall depend on the order in which one names parameters
        ordered = {name: params[name] for name in sorted(params)}
        self.state.save(self.job, RUN, Progress(round=step, best_round=step), ordered)
        self.step, self.params = step, self.state.model(self.job, RUN, step)
        path = self.state.model_file(self.job, RUN, step)
        self.runtime.events.write(
            "model saved", job=self.job, round=visit.round, step=step, site=by, sha256=sha256_file(path)
        )

    def note(self, step: int, visit: Visit) -> None:
        """Note the place of the model of a step."""
        self.state.note(self.job, _key(step), visit)
        self.visit = visit

    def keep(self, name: str) -> None:
        """Keep a copy of the model under a name."""
        with whole_file(self.folder / f"{name}.safetensors") as beside:
            shutil.copyfile(self.state.model_file(self.job, RUN, self.step), beside)

    def finish(self) -> None:
        """Give the last model its name, and let the scripts end."""
        self.keep("last")
        self.state.save(self.job, RUN, Progress(round=self.step, best_round=self.step, finished=True))
        self.deployment.end()


def _key(step: int) -> str:
    return f"visit {step}"
