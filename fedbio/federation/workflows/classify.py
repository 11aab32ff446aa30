"""The study: for every classifier and seed, all sites train together and each alone; then the best is published."""

from __future__ import annotations

__all__ = ["Classify"]

import contextlib
import copy
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FederationError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Parameters
from fedbio.federation.workflows.aggregation import make_aggregation
from fedbio.federation.workflows.fedavg import FedAvg, Outcome
from fedbio.federation.workflows.moments import federated_standardizer
from fedbio.federation.workflows.study import (
    Alone,
    Description,
    Evaluation,
    Publication,
    RunSpec,
    Study,
    meta,
    model_manifest,
    read_meta,
    study_folder,
)
from fedbio.federation.workflows.study_checks import alone_answer, description_answer, evaluation_answer, of_most
from fedbio.federation.workflows.study_metrics import CURVE, alone_rows, curve_rows, test_rows
from fedbio.progress import Progress as ProgressLine
from fedbio.results import (
    FEDERATED,
    METRICS_COLUMNS,
    METRICS_FILE,
    EncoderInfo,
    Metric,
    utc_now,
    write_party,
    write_table,
)
from fedbio.settings import ClassifyJob, input_problem

log = logging.getLogger(__name__)


class Classify(Controller):
    """Describe, standardize, train every classifier from every seed together and alone, evaluate, publish."""

    def __init__(self, runtime: Runtime, job: ClassifyJob) -> None:
        super().__init__(runtime)
        self.training, self.quantization, self.aggregation = job.training, job.quantization, job.aggregation
        self.settings: dict[str, Any] = job.model_dump(mode="json")
        self.study = Study(
            place=self.place(),
            classes=tuple(job.classes),
            validation_fraction=job.training.validation_fraction,
            min_proteins=job.training.min_proteins,
            attention_residues=job.training.attention_residues,
        )
        self.descriptions: dict[str, Description] = {}
        self.standardizer: Parameters = {}
        # several studies of one run differ in what they say of it
        self.record = copy.deepcopy(runtime.record) if self.study.place else runtime.record

    def place(self) -> str:
        """Return where the results are kept: in each party's folder, unless an earlier job's are there."""
        place = self.state.noted(self.job, "place", str)
        if place is None:
            studies = [
                row.name
                for row in self.state.jobs()
                if row.state not in ("failed", "aborted") and _workflow(row.content) == "classify"
            ]
            place = self.job if studies and studies[0] != self.job else ""
            self.state.note(self.job, "place", place)
        return place

    @property
    def folder(self) -> Path:
        """Where the server keeps the results."""
        return study_folder(self.runtime.workspace, self.study.place)

    def run(self) -> None:
        """Do the whole study; what was finished before a restart is not done again."""
        self.describe()
        self.standardize()
        specs = self.specs()
        with ProgressLine("training", total=len(specs) * self.training.rounds, unit="rounds") as self.progress:
            for spec in specs:
                self.compare(spec)
        self.publish()

    def specs(self) -> list[RunSpec]:
        """Return what the sites need to know to train each classifier from each seed."""
        chosen = self.training.model_dump(include=set(RunSpec.__struct_fields__))
        return [
            RunSpec(study=self.study, hidden=hidden, seed=seed, **chosen)
            for hidden in self.training.mlps
            for seed in self.training.seeds
        ]

    def describe(self) -> None:
        """Ask every site that has not told yet how many proteins of each class it has."""
        self.descriptions |= self.state.noted(self.job, "descriptions", dict[str, Description]) or {}
        new = [site for site in self.sites() if site not in self.descriptions]
        if new:
            # a late site may fail without harm to the others
            least = 0 if self.descriptions else self.runtime.desk.needed(len(new))
            results = self.broadcast_and_wait(
                "describe",
                FLModel(meta=meta(self.study)),
                new,
                min_responses=least,
                check=description_answer(self.study.classes),
            )
            self.enroll({each.site: read_meta(each.model.meta, Description) for each in results})
            self.state.note(self.job, "descriptions", self.descriptions)
        self.encoder = self.common_encoder()
        if problem := input_problem(self.training.mlps, self.encoder.pooling):
            raise FederationError(f"job {self.job}: {problem}")
        record = self.record
        record.classes, record.encoder = list(self.study.classes), self.encoder
        record.federation = {site: self.descriptions[site].counts for site in sorted(self.descriptions)}

    def enroll(self, told: Mapping[str, Description]) -> None:
        """Take sites in, but for those whose embeddings are of another encoder than the study's.

        The study's is that of the sites that are in it. Before there are any it is that of most sites, if they are more
        than the half and enough for a round; else nobody can say who is right, and all are taken in.
        """
        everybody = {**told, **self.descriptions}
        most = of_most(self.descriptions or everybody)
        enough = 2 * len(most) > len(everybody) and len(most) >= self.runtime.desk.needed(len(everybody))
        decided = bool(self.descriptions) or enough
        for site, each in told.items():
            fields = [name for name in everybody[most[0]].encoder.differing(each.encoder) if name != "dtype"]
            if fields and decided:
                reason = f"its embeddings differ in {', '.join(fields)} from those of {most[0]}; embed again"
                self.runtime.refused(site, "describe", reason)
            else:
                self.descriptions[site] = each

    def common_encoder(self) -> EncoderInfo:
        """Return the encoder of all sites' embeddings; arithmetic may differ between machines, all else may not."""
        infos = {site: each.encoder for site, each in sorted(self.descriptions.items())}
        first_site, first = next(iter(infos.items()))
        for site, info in infos.items():
            for field in first.differing(info):
                ours, theirs = getattr(first, field), getattr(info, field)
                if field != "dtype":
                    raise FederationError(
                        f"job {self.job}: embeddings differ in {field}: {first_site} has {ours!r}, "
                        f"{site} has {theirs!r}; embed again with one encoder"
                    )
        return first

    def standardize(self) -> None:
        """Compute the mean and scale of every feature over all sites' training proteins, once per job."""
        self.standardizer = self.state.stored(self.job, "standardizer") or federated_standardizer(
            self, self.study, self.encoder, self.registered("train")
        )
        self.state.store(self.job, "standardizer", self.standardizer)
        if not self.study.place:
            # for a map of the same proteins
            self.state.note("", "study", self.study)
            self.state.store("", "standardizer", self.standardizer)

    def registered(self, split: Any) -> dict[str, int]:
        """Return how many proteins of a split each site has registered."""
        return {site: each.total(split) for site, each in self.descriptions.items()}

    def compare(self, spec: RunSpec) -> None:
        """Train one classifier from one seed together and alone, and evaluate both on test proteins."""
        if self.state.noted(self.job, f"{spec.name} done", bool):
            self.progress.advance(spec.rounds)
            return
        self.describe()
        self.measured = 0
        with self.stage("train"):
            outcome = FedAvg(
                self.runtime,
                name=spec.name,
                initial=lambda delivery, expect: self.send(
                    "initialize", self.task(spec), expect=expect, delivery=delivery
                ),
                manifest=model_manifest(self.encoder.width, spec.hidden, len(self.study.classes)),
                rounds=spec.rounds,
                patience=spec.patience,
                training=self.registered("train"),
                validation=self.registered("validation"),
                meta=meta(spec),
                shared=self.standardizer,
                quantization=self.quantization,
                aggregation=self.aggregation,
                on_round=lambda number, means: self.note_round(spec, number, means),
            ).run()
        with self.stage("train alone"):
            self.train_alone(spec)
        with self.stage("evaluate"):
            self.evaluate(spec, outcome)
        self.state.note(self.job, f"{spec.name} done", True)
        self.write_metrics()
        self.progress.advance(spec.rounds - self.measured)
        log.info(
            "trained mlp=%s seed=%d best_round=%d validation_accuracy=%s",
            spec.hidden, spec.seed, outcome.best_round, _shown(outcome.best_value),
        )  # fmt: skip

    def train_alone(self, spec: RunSpec) -> None:
        """Have every site train by itself with the same budget, and note its curve and its test metrics."""
        for result in self.broadcast_and_wait(
            "train_alone", self.task(spec), self.enrolled(), check=alone_answer(spec)
        ):
            rows = alone_rows(spec, result.site, read_meta(result.model.meta, Alone))
            self.state.add_metrics(self.job, rows)

    def evaluate(self, spec: RunSpec, outcome: Outcome) -> None:
        """Have every site try the best global model on its test proteins, and note the metrics over all of them."""
        sites = outcome.models.reach(outcome.model, self.enrolled())
        results = self.broadcast_and_wait(
            "evaluate", self.task(spec, outcome), sites, check=evaluation_answer(len(self.study.classes))
        )
        evaluations = [read_meta(each.model.meta, Evaluation) for each in results]
        self.state.add_metrics(self.job, test_rows(spec, FEDERATED, outcome.best_round, evaluations))
        confidence = np.sum([each.confidence for each in evaluations if each.confidence], axis=0)
        self.state.note(self.job, f"{spec.name} confidence", np.asarray(confidence).tolist() or [])

    def task(self, spec: RunSpec, outcome: Outcome | None = None) -> FLModel:
        """Return what a task of a run carries: its settings, the standardizer, and perhaps a model."""
        number = 0 if outcome is None else outcome.best_round
        model = FLModel() if outcome is None else outcome.model
        params = {**self.standardizer, **model.params}
        return msgspec.structs.replace(
            model, params=params, meta=meta(spec), current_round=number, total_rounds=spec.rounds
        )

    def enrolled(self) -> list[str]:
        """Return the sites that are here and have described their data."""
        return [site for site in self.sites() if site in self.descriptions]

    def note_round(self, spec: RunSpec, number: int, means: Mapping[str, float]) -> None:
        """Note the means over all sites of one round."""
        self.progress.advance(number - self.measured)
        self.measured = number
        values = {name: means.get(name) for name in ("validation_accuracy", "validation_loss", "train_loss")}
        self.runtime.events.write("round", mlp=spec.hidden, seed=spec.seed, round=number, **values)
        curve = {(split, metric): values[f"{split}_{metric}"] for split, metric in CURVE}
        self.state.add_metrics(self.job, curve_rows(spec, FEDERATED, number, curve))

    def publish(self) -> None:
        """Choose the best classifier by validation accuracy, the first of equals, and send it to every site."""
        found = [(spec, progress) for spec in self.specs() if (progress := self.state.progress(self.job, spec.name))]
        best, progress = max(found, key=lambda each: -1.0 if each[1].best_value is None else each[1].best_value)
        record = self.record
        record.best = best.hidden
        record.rounds = {
            hidden: {str(spec.seed): each.best_round for spec, each in found if spec.hidden == hidden}
            for hidden in self.training.mlps
        }
        metrics = self.write_metrics()
        publication = Publication(
            study=self.study,
            encoder=self.encoder,
            best=best.hidden,
            seed=best.seed,
            best_round=progress.best_round,
            scores={
                f"{row.split}_{row.metric}": row.value
                for row in metrics
                if (row.party, row.model, row.seed, row.round)
                == (FEDERATED, best.hidden, best.seed, progress.best_round)
            },
            confidence=self.state.noted(self.job, f"{best.name} confidence", list[list[int]]) or [],
            rounds=record.rounds,
            federation=record.federation,
            settings=self.settings,
            # each site has its own ones: all of them to all would be their square
            metrics=[row for row in metrics if row.party == FEDERATED],
        )
        models = make_aggregation(self.aggregation, self.runtime, best.name)
        model = models.load(progress.best_round)
        published = msgspec.structs.replace(model, params={**self.standardizer, **model.params}, meta=meta(publication))
        self.broadcast_and_wait("publish", published, models.reach(model, self.sites()))
        if self.runtime.save_model is not None:
            self.runtime.save_model({**self.standardizer, **models.parameters(progress.best_round)}, publication)
        if self.study.place:
            record.finished = utc_now()
            write_party(self.folder, record)
        log.info("best model mlp=%s seed=%d round=%d", best.hidden, best.seed, progress.best_round)

    def write_metrics(self) -> list[Metric]:
        """Write ``metrics.csv`` as far as it has come, and return its rows."""
        rows = self.state.metrics(self.job)
        write_table(self.folder / METRICS_FILE, METRICS_COLUMNS, rows)
        return rows

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a stage of the server's record."""
        started = time.monotonic()
        yield
        seconds = self.record.seconds
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


def _workflow(content: str) -> str:
    """Return the workflow of the one job of a jobs file; empty if an earlier release did not note it."""
    return str(json.loads(content)["jobs"][0]["workflow"]) if content else ""


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
