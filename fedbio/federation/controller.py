"""The base of every federated algorithm: a `run` that hands tasks to sites and uses what comes back."""

from __future__ import annotations

__all__ = ["Controller", "Runtime"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fedbio.errors import FederationError
from fedbio.federation.acceptance import Expectation
from fedbio.federation.desk import Desk
from fedbio.federation.filters import Chain
from fedbio.federation.lockstep import Lockstep
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import IN_MEMORY, Delivery, FLModel, Parameters, Result, Task
from fedbio.federation.quantization import EXACT, Travel
from fedbio.federation.state import State
from fedbio.results import EventLog, PartyRecord
from fedbio.settings import FederationLimits
from fedbio.tensors.check import Manifest


@dataclass(slots=True, kw_only=True)
class Runtime:
    """What the server lends to a controller.

    Parameters
    ----------
    job : str
        Name of the job.
    desk : Desk
    state : State
    events : EventLog
    record : PartyRecord
        The server's account of the run, filled by the jobs.
    workspace : Path
    limits : FederationLimits
    send_file : callable
        Streams a file to a site: name of the site, path, what the file is.
    lockstep : Lockstep
        Averages what sites stream.
    save_model : callable or None
        Writes the model that a job publishes into the server's workspace: its tensors, and what is said of them.
    outgoing, incoming : Chain
        Filters on the models that leave and arrive.
    """

    job: str
    desk: Desk
    state: State
    events: EventLog
    record: PartyRecord
    workspace: Path
    limits: FederationLimits
    send_file: Callable[[str, Path, FileHeader], None]
    lockstep: Lockstep
    save_model: Callable[[Parameters, msgspec.Struct], None] | None = None
    outgoing: Chain = field(default_factory=Chain)
    incoming: Chain = field(default_factory=Chain)


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
        results = self.runtime.desk.ask(
            Task(name=task, model=sent, job=self.job, delivery=delivery),
            asked,
            Expectation(manifest=expect, weights=weights, delivery=delivery),
            min_responses=self.runtime.desk.needed(len(asked)) if min_responses is None else min_responses,
            deadline_s=self.runtime.limits.round_deadline_s if deadline_s is None else deadline_s,
            travel=travel,
        )
        return [msgspec.structs.replace(each, model=self.runtime.incoming(each.model, task=task)) for each in results]

    def send(
        self,
        task: str,
        model: FLModel | None = None,
        *,
        expect: Manifest | None = None,
        delivery: Delivery = IN_MEMORY,
    ) -> Result:
        """Hand one task to one site, the first that does it, and return its result.

        Raises
        ------
        FederationError
            If no site does it.
        """
        failures: list[str] = []
        for site in self.sites():
            try:
                [result] = self.broadcast_and_wait(
                    task, model, [site], min_responses=1, expect=expect, delivery=delivery
                )
                return result
            except FederationError as error:
                failures.append(str(error))
        raise FederationError("; ".join(failures) or f"job {self.job}: no site is here for task {task}")
