"""Compute what a run found: accuracy of every MLP, gains, scores by class, each with its interval."""

from __future__ import annotations

__all__ = ["Accuracy", "ClassScore", "Comparison", "Study", "study"]

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedbio.report.bootstrap import Estimate, resampled_sums
from fedbio.report.collect import Run, natural
from fedbio.results import CENTRAL, FEDERATED
from fedbio.settings import parse_network

K = TypeVar("K")
Flags = NDArray[np.bool_]
Values = NDArray[np.float64]


class Comparison(NamedTuple):
    """A site's own model and the federated one, on the same test proteins."""

    local: Estimate
    federated: Estimate
    gain: Estimate


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of one MLP, means over seeds.

    `local` is the mean over sites; `local` and `gain` are None if no site trained alone, `central` if there is no
    central model. `sites` holds each site's own comparison. `scores` has one accuracy per party and seed: the spread.
    """

    model: str
    weights: int
    local: Estimate | None
    federated: Estimate
    central: Estimate | None
    majority: Estimate
    gain: Estimate | None
    sites: dict[str, Comparison]
    scores: dict[str, dict[int, float]]


@dataclass(frozen=True)
class ClassScore:
    """F1 of one class for the best MLP; None where there is no such model or no test protein of the class."""

    name: str
    test_proteins: int
    local: Estimate | None
    federated: Estimate | None
    central: Estimate | None
    gain: Estimate | None


@dataclass(frozen=True)
class Study:
    """Everything the report says in numbers.

    Parameters
    ----------
    run : Run
        What it was computed from.
    accuracies : dict of str to Accuracy
        By MLP, smallest first.
    best : str
        The MLP with the best validation accuracy of the federated model.
    best_known : bool
        False if nothing was validated, so that `best` is merely the smallest.
    majority_class : str
        The most frequent class of all sites' training proteins.
    class_scores : list of ClassScore
        In the federation's order of classes.
    confusion : ndarray, shape (C, C), float64
        Test proteins by true class (rows) and class predicted by the federated model (columns), mean over seeds.
    test_proteins : int
        Number of different test proteins.
    seeds : list of int
        Seeds of the federated models.
    """

    run: Run
    accuracies: dict[str, Accuracy]
    best: str
    best_known: bool
    majority_class: str
    class_scores: list[ClassScore]
    confusion: Values
    test_proteins: int
    seeds: list[int]


class _Pair(NamedTuple):
    """One site's own predictions and the federated ones, with one seed, and where both exist."""

    site: str
    seed: int
    own: NDArray[np.int16]
    federated: NDArray[np.int16]
    both: Flags


@dataclass(frozen=True)
class _Verdicts:
    """Predictions as class numbers, -1 where a model was not asked; `targets` has shape (n,)."""

    targets: NDArray[np.int16]
    predicted: dict[tuple[str, str, int], NDArray[np.int16]]

    def of(self, party: str, model: str) -> dict[int, NDArray[np.int16]]:
        return {seed: rows for (who, what, seed), rows in self.predicted.items() if (who, what) == (party, model)}

    def pairs(self, model: str) -> list[_Pair]:
        federated = self.of(FEDERATED, model)
        return [
            _Pair(site, seed, own, federated[seed], (own >= 0) & (federated[seed] >= 0))
            for (site, what, seed), own in self.predicted.items()
            if what == model and site not in (FEDERATED, CENTRAL) and seed in federated
        ]


def study(run: Run) -> Study:
    """Compute everything that the report says from a run's predictions and curves."""
    verdicts = _verdicts(run)
    models = sorted(
        {model for party, model, _ in verdicts.predicted if party == FEDERATED}, key=lambda m: _weights(run, m)
    )
    validated = _validated(run, models)
    best = run.chosen if run.chosen in models else max(models, key=lambda m: validated.get(m, -1.0))
    majority = _majority_class(run, verdicts)
    return Study(
        run=run,
        accuracies=_accuracies(run, verdicts, models, majority),
        best=best,
        best_known=run.chosen in models or bool(validated),
        majority_class=run.classes[majority],
        class_scores=[_class_score(run, verdicts, best, number) for number in range(len(run.classes))],
        confusion=_confusion(verdicts, best, len(run.classes)),
        test_proteins=len(verdicts.targets),
        seeds=sorted(verdicts.of(FEDERATED, best)),
    )


def _verdicts(run: Run) -> _Verdicts:
    number = {name: index for index, name in enumerate(run.classes)}
    targets = {row.id: number[row.target] for row in run.predictions}
    position = {protein: index for index, protein in enumerate(sorted(targets))}
    predicted: dict[tuple[str, str, int], NDArray[np.int16]] = {}
    for row in sorted(run.predictions, key=lambda row: (natural(row.party), row.model, row.seed)):
        key = (row.party, row.model, row.seed)
        if key not in predicted:
            predicted[key] = np.full(len(position), -1, np.int16)
        predicted[key][position[row.id]] = number[row.predicted]
    return _Verdicts(np.array([targets[protein] for protein in sorted(targets)], np.int16), predicted)


def _weights(run: Run, model: str) -> int:
    """Number of weights of a classifier: its size."""
    shapes = parse_network(model).tensors(run.encoder.width if run.encoder else 768, len(run.classes))
    return sum(map(math.prod, shapes.values()))


def _validated(run: Run, models: Sequence[str]) -> dict[str, float]:
    """Each MLP's best validation accuracy as federated model, mean over seeds."""
    best: dict[str, dict[int, float]] = {}
    for row in run.metrics:
        if (row.party, row.split, row.metric) == (FEDERATED, "validation", "accuracy") and row.model in models:
            seeds = best.setdefault(row.model, {})
            seeds[row.seed] = max(row.value, seeds.get(row.seed, 0.0))
    return {model: float(np.mean(list(seeds.values()))) for model, seeds in best.items()}


def _majority_class(run: Run, verdicts: _Verdicts) -> int:
    """The class that a guesser who knows only the training counts would always name."""
    trained = [sum(counts.train.get(name, 0) for counts in run.counts.values()) for name in run.classes]
    frequent = trained if any(trained) else np.bincount(verdicts.targets, minlength=len(run.classes))
    return int(np.argmax(frequent))


def _accuracies(run: Run, verdicts: _Verdicts, models: Sequence[str], majority: int) -> dict[str, Accuracy]:
    targets = verdicts.targets
    columns: dict[tuple[object, ...], Flags] = {
        ("majority",): targets == majority,
        ("proteins",): np.ones(len(targets), bool),
    }
    for key, predicted in verdicts.predicted.items():
        columns["correct", *key] = predicted == targets
        columns["asked", *key] = predicted >= 0
    for model in models:
        for pair in verdicts.pairs(model):
            columns["own", pair.site, model, pair.seed] = pair.both & (pair.own == targets)
            columns["federated", pair.site, model, pair.seed] = pair.both & (pair.federated == targets)
            columns["both", pair.site, model, pair.seed] = pair.both
    sums = _resampled(columns)
    return {model: _accuracy(run, verdicts, model, sums) for model in models}


def _accuracy(run: Run, verdicts: _Verdicts, model: str, sums: Mapping[tuple[object, ...], Values]) -> Accuracy:
    accuracy = {
        (party, seed): _ratio(sums["correct", party, what, seed], sums["asked", party, what, seed])
        for party, what, seed in verdicts.predicted
        if what == model
    }
    own: dict[str, list[Values]] = {}
    federated: dict[str, list[Values]] = {}
    for site, seed, *_ in verdicts.pairs(model):
        key = (site, model, seed)
        own.setdefault(site, []).append(_ratio(sums["own", *key], sums["both", *key]))
        federated.setdefault(site, []).append(_ratio(sums["federated", *key], sums["both", *key]))
    # where all sites share one test set, the mean over sites of the federated model is the model itself
    alone = _mean(values for site in own.values() for values in site)
    together = _mean(values for site in federated.values() for values in site)
    central = _mean(values for (party, _), values in accuracy.items() if party == CENTRAL)
    scores: dict[str, dict[int, float]] = {}
    for (party, seed), values in accuracy.items():
        scores.setdefault(party, {})[seed] = float(values[0])
    if together is None:
        together = _mean(values for (party, _), values in accuracy.items() if party == FEDERATED)
    assert together is not None  # every model here has federated predictions
    return Accuracy(
        model=model,
        weights=_weights(run, model),
        local=_estimate(alone),
        federated=Estimate.of(together),
        central=_estimate(central),
        majority=Estimate.of(_ratio(sums["majority",], sums["proteins",])),
        gain=None if alone is None else Estimate.of(together - alone),
        sites={site: _compare(own[site], federated[site]) for site in own},
        scores=scores,
    )


def _compare(own: list[Values], federated: list[Values]) -> Comparison:
    alone, together = np.mean(own, axis=0), np.mean(federated, axis=0)
    return Comparison(Estimate.of(alone), Estimate.of(together), Estimate.of(together - alone))


def _class_score(run: Run, verdicts: _Verdicts, model: str, number: int) -> ClassScore:
    truly = verdicts.targets == number
    columns: dict[tuple[object, ...], Flags] = {}

    def add(kind: str, key: object, predicted: NDArray[np.int16], asked: Flags) -> None:
        columns[kind, key, "hit"] = asked & truly & (predicted == number)
        columns[kind, key, "named"] = asked & (predicted == number)
        columns[kind, key, "there"] = asked & truly

    pairs = verdicts.pairs(model)
    for pair in pairs:
        add("own", (pair.site, pair.seed), pair.own, pair.both)
        add("federated", (pair.site, pair.seed), pair.federated, pair.both)
    for seed, predicted in verdicts.of(CENTRAL, model).items():
        add("central", seed, predicted, predicted >= 0)
    if not pairs:
        for seed, predicted in verdicts.of(FEDERATED, model).items():
            add("federated", seed, predicted, predicted >= 0)
    sums = _resampled(columns)

    def mean_f1(kind: str) -> Values | None:
        return _mean(
            # undefined, not zero, where no protein of the class was drawn
            _ratio(2 * hits * (there > 0), (sums[kind, key, "named"] + there) * (there > 0))
            for (what, key, part), hits in sums.items()
            if (what, part) == (kind, "hit")
            for there in (sums[kind, key, "there"],)
        )

    if not truly.any():
        return ClassScore(run.classes[number], 0, None, None, None, None)
    own, federated, central = mean_f1("own"), mean_f1("federated"), mean_f1("central")
    gain = None if own is None or federated is None else federated - own
    return ClassScore(
        run.classes[number], int(truly.sum()), *(_estimate(values) for values in (own, federated, central, gain))
    )


def _confusion(verdicts: _Verdicts, model: str, classes: int) -> Values:
    counts = np.zeros((classes, classes))
    seeds = verdicts.of(FEDERATED, model)
    for predicted in seeds.values():
        asked = predicted >= 0
        np.add.at(counts, (verdicts.targets[asked], predicted[asked]), 1.0)
    return counts / len(seeds)


def _resampled(columns: Mapping[K, Flags]) -> dict[K, Values]:
    drawn = resampled_sums(np.column_stack(list(columns.values())).astype(np.float32))
    return dict(zip(columns, drawn.T, strict=True))


def _ratio(part: Values, whole: Values) -> Values:
    with np.errstate(invalid="ignore", divide="ignore"):
        return part / whole


def _mean(values: Iterable[Values]) -> Values | None:
    rows = list(values)
    return np.mean(rows, axis=0) if rows else None


def _estimate(values: Values | None) -> Estimate | None:
    return None if values is None else Estimate.of(values)
