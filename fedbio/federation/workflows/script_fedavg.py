"""Federated averaging of what training scripts make: choose sites, send and wait, aggregate, update, save."""

from __future__ import annotations

__all__ = ["ScriptFedAvg"]

import dataclasses
import fnmatch
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedbio.errors import FederationError
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.controller import Runtime
from fedbio.federation.model import Delivery, FLModel, Parameters, ParamsType, Result
from fedbio.federation.sampling import sample
from fedbio.federation.workflows.beside import Beside
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.fedavg import FedAvg, Outcome
from fedbio.federation.workflows.initial import initial_model
from fedbio.federation.workflows.robust import coordinate_median, krum, norm_outliers, trimmed_mean
from fedbio.federation.workflows.scaffold import COUNTED, initial_control, split_control, updated_control, with_control
from fedbio.federation.workflows.script import EVALUATE, EXCLUDE, INIT, TRAIN
from fedbio.federation.workflows.server_optimizers import ServerOptimization, in_dtypes_of
from fedbio.files import sha256_file, whole_file, write_whole
from fedbio.settings_jobs import FedAvgJob
from fedbio.tensors import manifest, weighted_mean
from fedbio.tensors.check import Manifest

RUN = "model"
"""Name of the one run of a job."""

OPTIMIZER, CONTROL_VARIATE, COUNTED_ROUNDS = "optimizer", "control", "counted"
"""What is kept beside the model of a round."""

Update = tuple[str, Parameters, float]
Combine = Callable[[Sequence[Update]], Parameters]


class ScriptFedAvg(FedAvg):
    """Every round, the sites' scripts train the same model; what becomes of their models is the job's to say.

    The mean (McMahan et al. 2017), or a rule that withstands some sites that send nonsense (see
    `fedbio.federation.workflows.robust`), gives the sites' change; a server optimizer (see
    `fedbio.federation.workflows.server_optimizers`) may take it as a gradient. SCAFFOLD's control variates travel
    beside the model (see `fedbio.federation.workflows.scaffold`). Best and last model are kept as
    ``models/JOB/best.safetensors`` and ``last.safetensors``, with ``model.json``.

    Parameters
    ----------
    runtime : Runtime
    job : FedAvgJob
    """

    train, validate = TRAIN, EVALUATE
    params_type = None

    def __init__(self, runtime: Runtime, job: FedAvgJob) -> None:
        self.settings = job
        super().__init__(
            runtime,
            name=RUN,
            initial=self.initialize,
            manifest=ANY_TENSORS,
            rounds=job.rounds,
            patience=job.patience or job.rounds + 1,
            training={},
            validation={},
            meta={},
            quantization=job.quantization,
            aggregation=job.aggregation,
            selection=job.selection,
            on_round=self.note_round,
        )
        self.deployment = Deployment(self, job, job.rounds)
        # filled as sites register
        self.training = self.validation = self.deployment.examples
        self.combine = combination(job)
        self.optimization = ServerOptimization(job.optimizer) if job.optimizer else None
        self.folder = runtime.workspace / "models" / runtime.job
        if job.aggregation == "file":
            self.params_type = ParamsType.FULL
        self.beside = Beside(self.folder)

    def run(self) -> Outcome:
        """Average until the rounds are over; keep the best and the last model."""
        self.deployment.sites()
        outcome = super().run()
        self.publish()
        self.deployment.end()
        return outcome

    # the model of round 0, and of the round that was saved last

    def initialize(self, delivery: Delivery, expect: Manifest | None) -> Result:
        """Return the model of round 0: the job's own, or what a site's script makes."""
        made = initial_model(
            self,
            file=self.settings.model,
            function=self.settings.client.initial,
            sites=self.deployment.sites(),
            rounds=self.rounds,
            exclude=self.settings.exclude,
        )
        kept = {name: value for name, value in made.items() if not self.stays(name)}
        if not kept:
            raise FederationError(f"job {self.job}: the initial model has no parameters that are not excluded")
        if self.settings.scaffold:
            self.beside.parts[CONTROL_VARIATE] = initial_control(kept)
        return Result(task=INIT, model=FLModel(params=kept))

    def begin_in_file(self) -> FLModel:
        """Take the job's model over as the model of round 0, without holding it in memory."""
        assert self.settings.model is not None  # the settings see to it
        with whole_file(self.state.model_path(self.job, RUN, 0)) as beside:
            shutil.copyfile(self.runtime.code / self.settings.model, beside)
        return self.model(self.models.load(0), 0)

    def stays(self, name: str) -> bool:
        """Whether a parameter stays at each site."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.settings.exclude)

    def load(self) -> FLModel:
        """Return the model that was saved last, or a new one, and take up what was kept beside it."""
        if self.settings.aggregation == "file" and self.state.progress(self.job, RUN) is None:
            self.save(self.begin_in_file())
        model = super().load()
        self.beside.load(model.current_round)
        return self.model(model, model.current_round)

    def save(self, model: FLModel) -> None:
        """Save the model and what is kept beside it."""
        self.beside.save(model.current_round)
        super().save(model)
        self.beside.forget_before(model.current_round)

    # a round

    def model(self, model: FLModel, number: int) -> FLModel:
        """Put what carries a model into what the sites get."""
        counted = {site: int(value[0]) for site, value in self.beside.parts.get(COUNTED_ROUNDS, {}).items()}
        self.meta = {
            "proximal_mu": self.settings.proximal_mu,
            "scaffold": self.settings.scaffold,
            EXCLUDE: self.settings.exclude,
            COUNTED: counted,
        }
        self.shared = with_control({}, self.beside.parts.get(CONTROL_VARIATE, {}))
        self.travel = dataclasses.replace(self.travel, exact=frozenset(self.shared))
        return super().model(model, number)

    def choose(self, model: FLModel) -> list[str]:
        """Return all sites that have the script, or so many of them as the job says."""
        sites = self.deployment.sites()
        wanted = self.settings.sites_per_round
        if wanted is None or model.current_round == self.rounds:
            return sites
        return list(sample(sites, wanted, seed=self.settings.seed, number=model.current_round))

    def expect(self, model: FLModel) -> Manifest | None:
        """Return what the tensors of an answer must be."""
        return {**(super().expect(model) or {}), **manifest(self.shared)}

    def aggregate(self, model: FLModel, results: Sequence[Result]) -> FLModel:
        """Return the next model."""
        if self.settings.aggregation == "file":
            return super().aggregate(model, results)
        counting = [each for each in results if each.model.weight > 0]
        updates = self.sound(model, [self.as_update(model, each) for each in counting])
        if not updates:
            raise FederationError(f"job {self.job}: no site has a model of round {model.current_round} that counts")
        combined = self.combine(updates)
        parts = self.beside.parts
        if self.settings.scaffold:
            named = {site for site, _, _ in updates}
            changes = [(each.site, split_control(each.model.params)[1]) for each in counting if each.site in named]
            weights = self.training if self.settings.weighted else None
            parts[CONTROL_VARIATE] = updated_control(
                parts[CONTROL_VARIATE], changes, len(self.training), weights=weights
            )
            counted = {site: np.array([model.current_round]) for site in sorted(named)}
            parts[COUNTED_ROUNDS] = {**parts.get(COUNTED_ROUNDS, {}), **counted}
        if self.optimization is not None:
            change = {name: value - model.params[name] for name, value in combined.items()}
            combined, parts[OPTIMIZER] = self.optimization.step(model.params, change, parts.get(OPTIMIZER))
        else:
            combined = in_dtypes_of(model.params, combined)
        # what a filter held back stays as it was
        return self.model(FLModel(params={**model.params, **combined}), model.current_round + 1)

    def as_update(self, model: FLModel, result: Result) -> Update:
        """Return a site's whole model and its weight, whether it sent the model or the difference."""
        params, _ = split_control(result.model.params)
        if result.model.params_type is ParamsType.DIFF:
            params = {name: model.params[name] + change for name, change in params.items()}
        return result.site, params, result.model.weight if self.settings.weighted else 1.0

    def sound(self, model: FLModel, updates: Sequence[Update]) -> list[Update]:
        """Leave out those whose change is out of all proportion to the others'."""
        if self.settings.norm_bound is None:
            return list(updates)
        outliers = norm_outliers(model.params, updates, self.settings.norm_bound)
        for each in outliers:
            self.runtime.refused(each.site, self.train, each.reason, round=model.current_round)
        named = {each.site for each in outliers}
        return [each for each in updates if each[0] not in named]

    def note_round(self, number: int, means: Mapping[str, float]) -> None:
        """Write the metrics of a round."""
        self.runtime.events.write("round", job=self.job, round=number, metrics=dict(means))

    # the end

    def publish(self) -> None:
        """Give the best and the last model their names, and say what they are."""
        card: dict[str, Any] = {"job": self.job, "metric": self.selection.metric, "value": self.progress.best_value}
        for name, number in (("best", self.progress.best_round), ("last", self.progress.round)):
            path = self.folder / f"{name}.safetensors"
            with whole_file(path) as beside:
                shutil.copyfile(self.state.model_file(self.job, RUN, number), beside)
            card[name] = {"round": number, "sha256": sha256_file(path)}
        # last: it names the digests of the other two
        write_whole(self.folder / "model.json", json.dumps(card, indent=2) + "\n")


def combination(job: FedAvgJob) -> Combine:
    """Return what makes one model of the sites'."""
    if job.aggregate == "median":
        return coordinate_median
    if job.aggregate == "trimmed_mean":
        return functools.partial(trimmed_mean, trim=job.trim)
    if job.aggregate == "krum":
        return functools.partial(krum, byzantine=job.byzantine)
    return weighted_mean
