"""Where the global model of a run of federated averaging is, and how the next one comes about."""

from __future__ import annotations

__all__ = ["Aggregation", "InFiles", "InLockstep", "InMemory", "Initial", "make_aggregation"]

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FederationError
from fedbio.federation.controller import Runtime
from fedbio.federation.lockstep import Exchanged
from fedbio.federation.messages import Exchange
from fedbio.federation.model import IN_MEMORY, Delivery, FLModel, Parameters, ParamsType, Result
from fedbio.federation.model_file import FileModel, ModelFile
from fedbio.federation.state import Progress
from fedbio.files import whole_file
from fedbio.tensors import average_files, manifest, weighted_mean
from fedbio.tensors.check import Manifest
from fedbio.tensors.combine import mean_manifest

log = logging.getLogger(__name__)

IN_FILES = Delivery("file")

Initial = Callable[[Delivery, Manifest | None], Result]
"""Has a site make the model of round 0; given how it shall come, and what parameters shall come with the result."""


class Aggregation(ABC):
    """Keeps one run's models.

    Parameters
    ----------
    runtime : Runtime
    run : str
    """

    def __init__(self, runtime: Runtime, run: str) -> None:
        self.runtime, self.run = runtime, run
        self.state, self.job = runtime.state, runtime.job

    @abstractmethod
    def begin(self, initial: Initial, manifest: Manifest) -> FLModel:
        """Return what carries the model of round 0, whose parameters are as `manifest` says."""

    @abstractmethod
    def load(self, number: int) -> FLModel:
        """Return what carries the model of a round that was saved."""

    @abstractmethod
    def parameters(self, number: int) -> Parameters:
        """Return the parameters of a round that was saved, as arrays over a file."""

    @abstractmethod
    def delivery(self, model: FLModel) -> Delivery:
        """Return how the parameters of the answers to a model come."""

    @abstractmethod
    def manifest(self, model: FLModel) -> Manifest | None:
        """Return what parameters must come with the answers to a model; None if none may."""

    def reach(self, model: FLModel, sites: Sequence[str]) -> Sequence[str]:
        """Return those of `sites` that a task with this model can be given to."""
        return sites

    @abstractmethod
    def mean(self, model: FLModel, results: Sequence[Result], best: int) -> FLModel:
        """Return what carries the next model: the weighted mean of results, which have parameters, over `model`.

        The model of round `best` is not needed less than this one.
        """

    @abstractmethod
    def save(self, progress: Progress, model: FLModel) -> None:
        """Save a round, so that a server that was killed goes on from it."""


class InMemory(Aggregation):
    """The model and all updates are in the server's memory."""

    def begin(self, initial: Initial, manifest: Manifest) -> FLModel:
        # copied: what a result carries is mapped from its spool file
        found = initial(IN_MEMORY, manifest).model.params
        return FLModel(params={name: value.copy() for name, value in found.items()})

    def load(self, number: int) -> FLModel:
        return FLModel(params=self.parameters(number))

    def parameters(self, number: int) -> Parameters:
        return self.state.model(self.job, self.run, number)

    def delivery(self, model: FLModel) -> Delivery:
        return IN_MEMORY

    def manifest(self, model: FLModel) -> Manifest:
        return manifest(model.params)

    def mean(self, model: FLModel, results: Sequence[Result], best: int) -> FLModel:
        mean = weighted_mean([(each.site, each.model.params, each.model.weight) for each in results])
        if results[0].model.params_type is ParamsType.DIFF:
            mean = {name: model.params[name] + change for name, change in mean.items()}
        # what a filter held back stays as it was
        return FLModel(params={**model.params, **mean})

    def save(self, progress: Progress, model: FLModel) -> None:
        self.state.save(self.job, self.run, progress, model.params)


class InFiles(Aggregation):
    """Updates are spooled to files and averaged run by run into the file of the next model: no model in memory."""

    def begin(self, initial: Initial, manifest: Manifest) -> FLModel:
        model = initial(IN_FILES, manifest).model
        assert isinstance(model, FileModel)
        with whole_file(self.state.model_path(self.job, self.run, 0)) as beside:
            shutil.copyfile(model.file.path, beside)
        return self.load(0)

    def load(self, number: int) -> FileModel:
        return FileModel(file=ModelFile.open(self.state.model_file(self.job, self.run, number)), current_round=number)

    def parameters(self, number: int) -> Parameters:
        return self.state.model(self.job, self.run, number)

    def delivery(self, model: FLModel) -> Delivery:
        return IN_FILES

    def manifest(self, model: FLModel) -> Manifest:
        assert isinstance(model, FileModel)
        return model.file.manifest

    def mean(self, model: FLModel, results: Sequence[Result], best: int) -> FLModel:
        assert isinstance(model, FileModel)
        average_files(
            [
                (each.site, each.model.file.path, each.model.weight)
                for each in results
                if isinstance(each.model, FileModel)
            ],
            self.state.model_path(self.job, self.run, model.current_round + 1),
            base=model.file.path,
            differences=results[0].model.params_type is ParamsType.DIFF,
        )
        return self.load(model.current_round + 1)

    def save(self, progress: Progress, model: FLModel) -> None:
        # the file was written first: the row may name it
        self.state.save(self.job, self.run, progress)


class _Standing(msgspec.Struct):
    """What the server knows of models that it does not have."""

    manifest: dict[str, tuple[tuple[int, ...], str]]
    """Shape and dtype of each tensor, in the order in which they travel."""
    holders: dict[int, list[str]] = {}
    """Who holds the model of a round."""
    last: Exchange | None = None
    """The exchange of the newest one."""


class InLockstep(Aggregation):
    """The sites hold the models; their updates pass through the server and leave it as their mean."""

    def begin(self, initial: Initial, manifest: Manifest) -> FLModel:
        result = initial(self._part(0), None)
        sites = self._sites()
        ordered = {name: manifest[name] for name in sorted(manifest)}
        self._standing = _Standing({name: (shape, dtype.str) for name, (shape, dtype) in ordered.items()})
        self._exchange({result.site: 1.0}, sites, 0)
        # means are float32, whatever the first model was
        mean = mean_manifest(ordered)
        self._standing.manifest = {name: (shape, dtype.str) for name, (shape, dtype) in mean.items()}
        self._note()
        return self._held(0)

    def load(self, number: int) -> FLModel:
        standing = self.state.noted(self.job, self._key, _Standing)
        if standing is None:
            raise FederationError(f"nobody holds the models of {self.run}; start again in a new workspace")
        self._standing = standing
        if standing.last is not None and standing.last.round == number:
            # a server that was killed may not have told all of them
            here = self._sites()
            self.runtime.lockstep.commit(standing.last, [site for site in standing.holders[number] if site in here])
        return self._held(number)

    def parameters(self, number: int) -> Parameters:
        path = self.state.model_path(self.job, self.run, number)
        holders = self._here(number)
        self.runtime.lockstep.fetch(
            holders[0], self._manifest, path, run=self._name, number=number,
            timeout_s=self.runtime.limits.round_deadline_s,
        )  # fmt: skip
        return self.state.model(self.job, self.run, number)

    def delivery(self, model: FLModel) -> Delivery:
        return self._part(model.current_round + 1)

    def manifest(self, model: FLModel) -> None:
        return None

    def reach(self, model: FLModel, sites: Sequence[str]) -> Sequence[str]:
        number = model.current_round
        lacking = [site for site in sites if site not in self._standing.holders.get(number, [])]
        if lacking:
            try:
                self._exchange({self._here(number)[0]: 1.0}, lacking, number)
            except FederationError as error:
                log.warning("sites lack the model of round %d sites=%s reason=%s", number, ",".join(lacking), error)
        reached = [site for site in sites if site in self._standing.holders.get(number, [])]
        if len(reached) < self.runtime.desk.needed(len(sites)):
            raise FederationError(
                f"job {self.job}: {len(reached)} of {len(sites)} sites hold the model of round {number} of {self.run}; "
                f"missing: {', '.join(site for site in sites if site not in reached)}"
            )
        return reached

    def mean(self, model: FLModel, results: Sequence[Result], best: int) -> FLModel:
        number = model.current_round
        # who has not answered may have lost the model
        self._exchange(
            {each.site: each.model.weight for each in results}, self._sites(), number + 1, keep=(number, best)
        )
        self._standing.holders = {
            each: sites for each, sites in self._standing.holders.items() if each in (number + 1, number, best)
        }
        self._note()
        return self._held(number + 1)

    def save(self, progress: Progress, model: FLModel) -> None:
        self.state.save(self.job, self.run, progress)

    @property
    def _name(self) -> str:
        return f"{self.job}/{self.run}"

    @property
    def _key(self) -> str:
        return f"{self.run} lockstep"

    @property
    def _manifest(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in self._standing.manifest.items()}

    def _part(self, number: int) -> Delivery:
        return Delivery("lockstep", self._name, number)

    def _held(self, number: int) -> FLModel:
        return FLModel(held=self._name, current_round=number)

    def _sites(self) -> tuple[str, ...]:
        return self.runtime.desk.sites(self.job)

    def _here(self, number: int) -> list[str]:
        here = [site for site in self._standing.holders.get(number, []) if site in self._sites()]
        if not here:
            raise FederationError(
                f"job {self.job}: no site is here that holds the model of round {number} of {self.run}"
            )
        return here

    def _note(self) -> None:
        self.state.note(self.job, self._key, self._standing)

    def _exchange(
        self, weights: Mapping[str, float], receivers: Sequence[str], number: int, keep: Sequence[int] = ()
    ) -> None:
        """Average, and note who holds the mean: all that have it before anyone is told, and those that were told."""
        before = self._standing.holders.get(number, [])

        def note(done: Exchanged) -> None:
            self._standing.holders[number] = sorted({*before, *done.holders})
            if self._standing.last is None or number >= self._standing.last.round:
                self._standing.last = done.exchange
            self._note()

        done = self.runtime.lockstep.average(
            weights,
            self._manifest,
            receivers,
            run=self._name,
            number=number,
            keep=keep,
            min_parts=self.runtime.desk.needed(len(weights)),
            timeout_s=self.runtime.limits.round_deadline_s,
            on_commit=note,
        )
        note(done)
        for site, reason in done.faults.items():
            self.runtime.refused(site, "exchange", reason, id=done.exchange.id, round=number)


def make_aggregation(kind: str, runtime: Runtime, run: str) -> Aggregation:
    """Return a run's aggregation of a kind: ``"memory"``, ``"file"`` or ``"lockstep"``."""
    kinds: dict[str, type[Aggregation]] = {"memory": InMemory, "file": InFiles, "lockstep": InLockstep}
    return kinds[kind](runtime, run)
