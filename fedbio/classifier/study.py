"""Train every MLP with every seed on one party's data, measure them, and keep the best."""

from __future__ import annotations

__all__ = ["MODEL_FOLDER", "StudyOutcome", "run_study"]

import platform
import resource
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from fedbio import __version__
from fedbio.classifier.alone import AloneOutcome, train_alone
from fedbio.classifier.data import SiteData
from fedbio.classifier.examples import TrainData
from fedbio.classifier.inference import Evaluation, measure, predict
from fedbio.classifier.model_files import ModelCard, save_model
from fedbio.classifier.records import curve_metrics, measured_metrics, prediction_rows
from fedbio.classifier.standardize import Standardizer
from fedbio.classifier.threads import torch_threads
from fedbio.classifier.unsure import choose_threshold, confidence_counts
from fedbio.errors import DataError
from fedbio.progress import Progress
from fedbio.results import (
    CENTRAL,
    METRICS_COLUMNS,
    METRICS_FILE,
    PREDICTIONS_COLUMNS,
    PREDICTIONS_FILE,
    Metric,
    PartyRecord,
    Prediction,
    utc_now,
    write_party,
    write_table,
)
from fedbio.settings import TrainingSettings, input_problem, parse_network

MODEL_FOLDER = "model"


@dataclass(frozen=True)
class _Run:
    """One MLP with one seed, trained and measured; an evaluation of no protein has count 0."""

    mlp: str
    seed: int
    outcome: AloneOutcome
    validation: Evaluation
    test: Evaluation
    confidence: NDArray[np.int64]
    predictions: list[Prediction]


@dataclass(frozen=True)
class StudyOutcome:
    """What a study came to.

    Parameters
    ----------
    best : str
        The MLP with the best mean validation accuracy over its seeds.
    card : ModelCard
        Of the model in ``model/``: of that MLP, the seed with the best validation accuracy.
    accuracy : dict of str to float
        Mean test accuracy over the seeds, by MLP; nan without test proteins.
    """

    best: str
    card: ModelCard
    accuracy: dict[str, float]


def run_study(
    data: SiteData,
    training: TrainingSettings,
    output: Path,
    *,
    party: str = CENTRAL,
    synthetic: bool = False,
    threads: int | None = None,
) -> StudyOutcome:
    """Train, measure, and write ``party.json``, ``metrics.csv``, ``predictions.csv`` and the folder ``model/``.

    Parameters
    ----------
    data : SiteData
        Of one party, or of several put together; then the study is the ceiling for a federation of these.
    training : TrainingSettings
    output : Path
        The party's folder; ``party.json`` appears last.
    party : str
        Whose models these are.
    synthetic : bool
        Whether the proteins are made up.
    threads : int, optional
        MLPs and seeds to train at once, each on one thread; by default as many as torch would use. Results do not
        depend on it.

    Raises
    ------
    DataError
        If there are no training proteins, the embeddings are not what the classifiers read, or training goes astray.
    """
    started, clock = utc_now(), time.perf_counter()
    if not len(data.train):
        raise DataError(f"{data.source}: no protein with SET=train; there is nothing to train on")
    if problem := input_problem(training.mlps, data.encoder.pooling):
        raise DataError(f"{data.source}: {problem}")
    standardizer = Standardizer.fit(data.train.features)
    train, validation, test = (
        TrainData(standardizer.apply(part.features), part.targets, part.ids)
        for part in (data.train, data.validation, data.test)
    )
    jobs = [(mlp, seed) for mlp in training.mlps for seed in training.seeds]
    lock = threading.Lock()
    with Progress(f"{party}: training", total=len(jobs) * (training.rounds + 1), unit="rounds") as progress:

        def advance(rounds: int) -> None:
            with lock:
                progress.advance(rounds)

        def run(job: tuple[str, int]) -> _Run:
            mlp, seed = job
            hidden, attention = parse_network(mlp)
            outcome = train_alone(
                train,
                validation,
                hidden=hidden,
                classes=len(data.classes),
                attention=attention,
                rounds=training.rounds,
                epochs_per_round=training.epochs,
                patience=training.patience,
                batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                dropout=training.dropout,
                seed=seed,
                on_round=lambda _: advance(1),
            )
            advance(training.rounds + 1 - len(outcome.curve))
            on_validation = predict(outcome.parameters, validation.features)
            on_test = predict(outcome.parameters, test.features)
            return _Run(
                mlp,
                seed,
                outcome,
                measure(on_validation, validation.targets),
                measure(on_test, test.targets),
                confidence_counts(on_validation, validation.targets),
                prediction_rows(party, mlp, seed, test, on_test, data.classes),
            )

        # an MLP's step is too small to be worth sharing between threads, but two runs go well side by side
        with torch_threads(1) as before, ThreadPoolExecutor(min(threads or before, len(jobs))) as pool:
            runs = list(pool.map(run, jobs))
    accuracy = {mlp: fmean(each.test.accuracy for each in runs if each.mlp == mlp) for mlp in training.mlps}
    chosen = _choose(runs, training.mlps)
    hidden, attention = parse_network(chosen.mlp)
    card = ModelCard(
        classes=list(data.classes),
        hidden=list(hidden),
        attention=attention,
        attention_residues=training.attention_residues if attention else None,
        encoder=data.encoder,
        unsure_below=choose_threshold(chosen.confidence),
        seed=chosen.seed,
        round=chosen.outcome.best_round,
        metrics=_card_metrics(chosen),
        trained_by=[party],
    )
    save_model(output / MODEL_FOLDER, chosen.outcome.parameters, standardizer, card)
    metrics = [row for each in runs for row in _metric_rows(party, each)]
    write_table(output / METRICS_FILE, METRICS_COLUMNS, metrics)
    write_table(output / PREDICTIONS_FILE, PREDICTIONS_COLUMNS, (row for each in runs for row in each.predictions))
    record = PartyRecord(
        party=party,
        role="central" if party == CENTRAL else "site",
        versions=_versions(),
        settings={"training": training.model_dump(mode="json")},
        seconds={"train": round(time.perf_counter() - clock, 3)},
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        classes=list(data.classes),
        encoder=data.encoder,
        data=data.describe(synthetic=synthetic),
        best=chosen.mlp,
        rounds={
            mlp: {str(each.seed): each.outcome.best_round for each in runs if each.mlp == mlp} for mlp in training.mlps
        },
        remarks=_remarks(data),
        started=started,
        finished=utc_now(),
    )
    write_party(output, record)
    return StudyOutcome(chosen.mlp, card, accuracy)


def _choose(runs: Sequence[_Run], mlps: Sequence[str]) -> _Run:
    """Return the best run of the MLP that is best on average, both on validation; the first of equals."""

    def score(run: _Run) -> float:
        return run.validation.accuracy if run.validation.count else 0.0

    best = max(mlps, key=lambda mlp: fmean(score(each) for each in runs if each.mlp == mlp))
    return max((each for each in runs if each.mlp == best), key=score)


def _metric_rows(party: str, run: _Run) -> list[Metric]:
    outcome = run.outcome
    return curve_metrics(party, run.mlp, run.seed, outcome.curve) + measured_metrics(
        party, run.mlp, run.seed, outcome.best_round, run.test
    )


def _card_metrics(run: _Run) -> dict[str, float]:
    measured = {"validation": run.validation, "test": run.test}
    return {f"{split}_accuracy": each.accuracy for split, each in measured.items() if each.count}


def _versions() -> dict[str, str]:
    return {
        "fedbio": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }


def _remarks(data: SiteData) -> list[str]:
    remarks = []
    if not len(data.validation):
        remarks.append("No validation proteins: the last round of each run was taken.")
    if absent := [name for name in data.classes if name not in data.counts.train]:
        remarks.append(f"No training protein of: {', '.join(absent)}.")
    return remarks
