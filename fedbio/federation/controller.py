"""The base of every federated algorithm: a `run` that hands tasks to sites and uses what comes back."""

from __future__ import annotations

__all__ = ["Controller", "Runtime"]

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fedbio.errors import FederationError
from fedbio.federation.acceptance import Expectation
from fedbio.federation.filters import Chain
from fedbio.federation.job_desk import JobDesk
from fedbio.federation.lockstep import Lockstep
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import IN_MEMORY, Delivery, FLModel, Parameters, ParamsType, Result, Task
from fedbio.federation.quantization import EXACT, Travel
from fedbio.federation.sampling import sample
from fedbio.federation.split_relay import SplitRelay
from fedbio.federation.state import State
from fedbio.results import EventLog, PartyRecord
from fedbio.settings import FederationLimits
from fedbio.tensors.check import Manifest, manifest

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Runtime:
    """What the server lends to a controller.

    Parameters
    ----------
    job : str
        Name of the job.
    desk : JobDesk
    state : State
    events : EventLog
    record : PartyRecord
        The server's account of the run, filled by the jobs.
    workspace : Path
    code : Path
        The folder of the job's file, and of those that it names.
    limits : FederationLimits
    send_file : callable
        Streams a file to a site: name of the site, path, what the file is, and its kind in the ledger.
    lockstep : Lockstep
        Averages what sites stream.
    split : SplitRelay or None
        Passes on what two sites send each other.
    save_model : callable or None
        Writes the model that a job publishes into the server's workspace: its tensors, and what is said of them.
    outgoing, incoming : Chain
        Filters on the models that leave and arrive.
    """

    job: str
    desk: JobDesk
    state: State
    events: EventLog
    record: PartyRecord
    workspace: Path
    code: Path
    limits: FederationLimits
    send_file: Callable[[str, Path, FileHeader, str], None]
    lockstep: Lockstep
    split: SplitRelay | None = None
    save_model: Callable[[Parameters, msgspec.Struct], None] | None = None
    outgoing: Chain = field(default_factory=Chain)
    incoming: Chain = field(default_factory=Chain)

    def refused(self, site: str, task: str, reason: str, **details: Any) -> None:
        """Note that what a site has said does not count; `details` are JSON values."""
        log.warning("result refused job=%s site=%s task=%s reason=%s", self.job, site, task, reason)
        self.events.write("result refused", job=self.job, site=site, task=task, reason=reason, **details)


class Controller(ABC):
    """A federated computation, seen from the server.

    Examples
    --------
    A controller that asks every site for a number and averages::

        class MeanLength(Controller):
            def run(self) -> None:
                results = self.broadcast_and_wait("length")
                self.mean = sum(each.model.metrics["length"] for each in results) / len(results)
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.state = runtime.state
        self.job = runtime.job

    @abstractmethod
    def run(self) -> Any:
        """Do the whole computation."""

    def sites(self) -> tuple[str, ...]:
        """Return the sites of this job that are here; wait for enough of them if need be."""
        desk = self.runtime.desk
        here = desk.sites(self.job)
        least = desk.needed(len(desk.expected))
        if len(here) < least:
            here = desk.wait_for_sites(self.job, deadline_s=self.runtime.limits.round_deadline_s, gather_s=0)
        return here

    def broadcast_and_wait(
        self,
        task: str,
        model: FLModel | None = None,
        sites: Sequence[str] | None = None,
        *,
        min_responses: int | None = None,
        deadline_s: float | None = None,
        expect: Manifest | None = None,
        weights: Mapping[str, int] | None = None,
        delivery: Delivery = IN_MEMORY,
        travel: Travel = EXACT,
        params_type: ParamsType | None = ParamsType.FULL,
        check: Callable[[Result], None] | None = None,
        on_result: Callable[[Result], None] | None = None,
        missing: dict[str, str] | None = None,
    ) -> list[Result]:
        """Hand one task to sites and wait for their results.

        Parameters
        ----------
        task : str
            The name of the task.
        model : FLModel, optional
            What the sites get.
        sites : sequence of str, optional
            Who is asked; everyone who is here by default.
        min_responses : int, optional
            How many results there must be when the deadline has passed; by default the federation's `min_sites`.
        deadline_s : float, optional
            By default the federation's `round_deadline_s`.
        expect : mapping of str to (shape, dtype), optional
            What the tensors of a result must be; none may come by default.
        weights : mapping of str to int, optional
            The most weight that each site may claim; by default results have no weight.
        delivery : Delivery
            How the parameters of a result come.
        travel : Travel
            In which schemes the parameters of task and results travel; exact by default.
        params_type : ParamsType or None
            Whether results are whole models or differences; None takes either.
        check : callable, optional
            Given each result before it is accepted, on another thread; raises a `ProtocolError` if what it says cannot
            be true. The result is refused then, and the task goes on.
        on_result : callable, optional
            Called with each accepted result as it comes, on this thread; what it raises ends the task.
        missing : dict of str to str, optional
            Filled with the sites that are not among the results, and why.

        Returns
        -------
        list of Result
            Sorted by site, whatever the order in which they came.

        Raises
        ------
        FederationError
            If there are fewer results than `min_responses`; names who is missing, and why.
        """
        asked = self.sites() if sites is None else tuple(sites)
        sent = self.runtime.outgoing(model or FLModel(), task=task)
        come: dict[str, Result] = {}

        def arrived(result: Result) -> None:
            # filtered once: a filter may draw random numbers
            model = self.runtime.incoming(result.model, task=task)
            come[result.site] = msgspec.structs.replace(result, model=model)
            if on_result is not None:
                on_result(come[result.site])

        self.runtime.desk.ask(
            Task(name=task, model=sent, job=self.job, delivery=delivery),
            asked,
            Expectation(manifest=expect, weights=weights, params_type=params_type, delivery=delivery, check=check),
            min_responses=self.runtime.desk.needed(len(asked)) if min_responses is None else min_responses,
            deadline_s=self.runtime.limits.round_deadline_s if deadline_s is None else deadline_s,
            travel=travel,
            on_result=arrived,
            missing=missing,
        )
        return [come[site] for site in sorted(come)]

    def relay(
        self,
        task: str,
        model: FLModel,
        sites: Sequence[str],
        *,
        min_responses: int | None = None,
        deadline_s: float | None = None,
        expect: Manifest | None = None,
        weights: Mapping[str, int] | None = None,
        travel: Travel = EXACT,
        params_type: ParamsType | None = None,
        on_result: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """Hand a model from site to site: each gets what the one before it made of it.

        A site that fails, refuses, is gone or is past its deadline is skipped, as an event "site skipped" with its
        reason, and the next one gets the model that it would have got. A site that abstains (weight 0) passes the
        model on as it is.

        Parameters
        ----------
        task : str
            The name of the task.
        model : FLModel
            What the first site gets; the others get the same but for the parameters.
        sites : sequence of str
            Who is asked, in this order.
        min_responses : int, optional
            How many sites must answer; by default as many as the federation's `min_sites`.
        deadline_s : float, optional
            For each site; by default the federation's `round_deadline_s`.
        expect : mapping of str to (shape, dtype), optional
            What the tensors of a result must be; those of `model` by default.
        weights : mapping of str to int, optional
            The most weight that each site may claim; by default results have no weight.
        travel : Travel
            In which schemes the parameters of task and results travel; exact by default.
        params_type : ParamsType or None
            Whether results are whole models or differences; None, the default, takes either.
        on_result : callable, optional
            Called with each result when it has come, before the next site is asked.

        Returns
        -------
        list of Result
            In the order of the visits. The parameters of each are the whole model, also if the site sent a
            difference; those of the last one are what the relay made.

        Raises
        ------
        FederationError
            As soon as so many sites were skipped that `min_responses` cannot be reached; names them, and why.
        """
        least = self.runtime.desk.needed(len(sites)) if min_responses is None else min_responses
        results: list[Result] = []
        skipped: dict[str, str] = {}
        for site in sites:
            missing: dict[str, str] = {}
            found = self.broadcast_and_wait(
                task, model, [site], min_responses=0, deadline_s=deadline_s,
                expect=manifest(model.params) if expect is None else expect,
                weights=weights, travel=travel, params_type=params_type, missing=missing,
            )  # fmt: skip
            if found:
                result = whole(found[0], model.params)
                model = msgspec.structs.replace(model, params=result.model.params)
                results.append(result)
                if on_result is not None:
                    on_result(result)
                continue
            skipped |= missing
            self.runtime.events.write(
                "site skipped", site=site, task=task, job=self.job, round=model.current_round, reason=skipped[site]
            )
            if len(sites) - len(skipped) < least:
                raise FederationError(
                    f"job {self.job}: task {task} of round {model.current_round}: at most {len(sites) - len(skipped)} "
                    f"of {len(sites)} sites can answer, {least} are needed; "
                    + "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
                )
        return results

    def sample(self, sites: Iterable[str], count: int, *, seed: int, number: int) -> tuple[str, ...]:
        """Choose `count` of `sites` for a round, sorted by name; see `fedbio.federation.sampling.sample`."""
        return sample(sites, count, seed=seed, number=number)

    def send(
        self,
        task: str,
        model: FLModel | None = None,
        sites: Sequence[str] | None = None,
        *,
        expect: Manifest | None = None,
        delivery: Delivery = IN_MEMORY,
        deadline_s: float | None = None,
    ) -> Result:
        """Hand one task to one site, the first of `sites` that does it, and return its result.

        Parameters
        ----------
        task, model, expect, delivery
            As for `broadcast_and_wait`.
        sites : sequence of str, optional
            Who is asked, in this order, until one has done it; by default everyone who is here, by name.
        deadline_s : float, optional
            For each site; by default the federation's `round_deadline_s`.

        Raises
        ------
        FederationError
            If no site does it.
        """
        failures: list[str] = []
        for site in self.sites() if sites is None else sites:
            try:
                [result] = self.broadcast_and_wait(
                    task, model, [site], min_responses=1, expect=expect, delivery=delivery, deadline_s=deadline_s
                )
                return result
            except FederationError as error:
                failures.append(str(error))
        raise FederationError("; ".join(failures) or f"job {self.job}: no site is here for task {task}")


def whole(result: Result, params: Parameters) -> Result:
    """Return a result with the whole model that a site made of `params`, whatever it sent; nothing if it abstained."""
    found = result.model
    if found.params_type is ParamsType.DIFF:
        made = {name: params[name] + change for name, change in found.params.items()}
    else:
        made = found.params
    # what a filter held back, and what a site that abstains has not touched, stays as it was
    model = msgspec.structs.replace(found, params={**params, **made}, params_type=ParamsType.FULL)
    return msgspec.structs.replace(result, model=model)
