"""What embeddings are worth for subcellular location, against features that need no encoder.

``python benchmarks/scl_probe.py mixed_soft.csv.gz --embeddings window=window.h5 --embeddings cut=cut.h5`` takes a table
in FLIP's form, trains on its training part, chooses on its validation part, and measures once on its test part:

- for each embeddings file an MLP that three sites (Dirichlet, alpha 1) train alone, together and centrally, as the
  workflow does it: real processes over mutual TLS, three seeds;
- composition features with gradient-boosted trees and with logistic regression: amino acids, dipeptides, the amino
  acids of terminal windows, and the length; and the same beside each file's embeddings.

Accuracy (Q10), macro F1 and MCC, each with a 95 % bootstrap interval over test proteins. Results of the federated runs
stay in ``results/probe-NAME``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import Embeddings
from fedbio.proteins import Protein, read

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
TERMINI = (10, 20, 40, 60)
"""Residues of the windows at both ends."""

RESAMPLES = 2_000

Measures = dict[str, tuple[float, float, float]]
"""Accuracy, macro F1 and MCC: the value and the ends of its interval."""


def compositions(proteins: Sequence[Protein]) -> NDArray[np.float32]:
    """Return what the letters alone say, shape (proteins, 20 + 400 + 2 * 20 * windows + 1)."""
    number = np.full(256, len(LETTERS), np.int64)
    number[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(len(LETTERS))

    def shares(codes: NDArray[np.int64], kinds: int) -> NDArray[np.float64]:
        counts = np.bincount(codes[codes < kinds], minlength=kinds)[:kinds]
        found: NDArray[np.float64] = counts / max(1, counts.sum())
        return found

    rows = []
    for protein in proteins:
        codes = number[np.frombuffer(protein.sequence.encode(), np.uint8)]
        usual = (codes[:-1] < len(LETTERS)) & (codes[1:] < len(LETTERS))
        pairs = (codes[:-1] * len(LETTERS) + codes[1:])[usual]
        windows = [shares(part, len(LETTERS)) for size in TERMINI for part in (codes[:size], codes[-size:])]
        rows.append(np.concatenate([shares(codes, len(LETTERS)), shares(pairs, 400), *windows, [np.log(len(codes))]]))
    return np.array(rows, np.float32)


def measure(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> Measures:
    """Measure predictions, and how sure the numbers are; several models' predictions may be stacked, (models, n)."""
    stacked = np.atleast_2d(predicted)
    draws = np.random.default_rng(0).integers(0, len(targets), size=(RESAMPLES, len(targets)))
    found: dict[str, list[float]] = defaultdict(list)
    for rows in (np.arange(len(targets)), *draws):
        scores = [_scores(targets[rows], each[rows]) for each in stacked]
        for name in scores[0]:
            found[name].append(float(np.mean([each[name] for each in scores])))
    ends = {name: np.percentile(values[1:], [2.5, 97.5]) for name, values in found.items()}
    return {name: (values[0], float(ends[name][0]), float(ends[name][1])) for name, values in found.items()}


def _scores(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, float]:
    classes = len(COMPARTMENTS)
    confusion = np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)
    right, seen, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    total = confusion.sum()
    f1 = 2 * right / np.maximum(1, seen + said)
    spread = float(np.sqrt(float(total**2 - (said**2).sum()) * float(total**2 - (seen**2).sum())))
    return {
        "accuracy": right.sum() / total,
        "macro_f1": float(f1[seen > 0].mean()),
        "mcc": float(right.sum() * total - (seen * said).sum()) / spread if spread else 0.0,
    }


def baselines(
    features: NDArray[np.float32], targets: NDArray[np.int64], parts: dict[str, NDArray[np.int64]]
) -> Iterator[tuple[str, Measures]]:
    """Train on the training part, choose on the validation part, measure on the test part."""
    train, validation, test = (parts[name] for name in ("train", "validation", "test"))
    best: tuple[float, NDArray[np.int64]]
    best = (-1.0, np.empty(0, np.int64))
    for rate in (0.05, 0.1):
        trees = HistGradientBoostingClassifier(
            learning_rate=rate, max_iter=400, max_leaf_nodes=15, l2_regularization=1.0, early_stopping=True,
            n_iter_no_change=15, random_state=0,
        )  # fmt: skip
        trees.fit(features[train], targets[train], X_val=features[validation], y_val=targets[validation])
        score = float((trees.predict(features[validation]) == targets[validation]).mean())
        best = max(best, (score, trees.predict(features[test])), key=lambda each: each[0])
    yield "boosted trees", measure(targets[test], best[1])
    best = (-1.0, best[1])
    for strength in (0.003, 0.03, 0.3):
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        linear.fit(features[train], targets[train])
        score = float((linear.predict(features[validation]) == targets[validation]).mean())
        best = max(best, (score, linear.predict(features[test])), key=lambda each: each[0])
    yield "logistic regression", measure(targets[test], best[1])


def federation(table: Path, name: str, embeddings: Path, mlp: str) -> Iterator[tuple[str, Measures]]:
    """Have three sites train the MLP alone, together and centrally; measure what they said of the test proteins."""
    run = f"probe-{name}"
    settings = [f"dataset={table}", f"embeddings={embeddings}", f"run={run}", f'training={{"mlps": ["{mlp}"]}}']
    command = ["snakemake", "--cores", "all", "--config", *settings]
    subprocess.run(command, check=True, stdout=sys.stderr)
    said: dict[str, dict[tuple[str, str], dict[str, tuple[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(Path("results", run).glob("*/predictions.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                party = row["party"]
                kind = party if party in ("federated", "central") else "alone"
                said[kind][party, row["seed"]][row["id"]] = (row["target"], row["predicted"])
    for kind, models in sorted(said.items()):
        names = sorted(next(iter(models.values())))
        targets = _numbers(next(iter(models.values()))[each][0] for each in names)
        predicted = np.array([_numbers(model[each][1] for each in names) for model in models.values()])
        yield f"MLP {mlp}, {kind}", measure(targets, predicted)


def _numbers(labels: Iterator[str]) -> NDArray[np.int64]:
    return np.array([COMPARTMENTS.index(label) for label in labels], np.int64)


def rows_of(path: Path, proteins: Sequence[Protein]) -> NDArray[np.float32]:
    """Return the embeddings of the proteins, in their order, shape (proteins, d)."""
    with Embeddings.open(path) as store:
        places = {name: place for place, name in enumerate(store.ids)}
        return store.take(np.array([places[protein.id] for protein in proteins], np.int64))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="proteins with labels in FLIP's form")
    parser.add_argument(
        "--embeddings", action="append", default=[], metavar="NAME=H5", help="embeddings of these proteins; repeatable"
    )
    parser.add_argument("--mlp", default="256-128-64", help="hidden layers of the MLP (default: %(default)s)")
    parser.add_argument("--beside", action="store_true", help="also embeddings beside the composition features")
    args = parser.parse_args()
    proteins = [each for each in read(args.table) if each.target is not None]
    targets = _numbers(str(each.target) for each in proteins)
    part = np.array(["validation" if each.validation else each.set for each in proteins])
    parts = {name: np.flatnonzero(part == name) for name in ("train", "validation", "test")}
    composition = compositions(proteins)

    results: list[dict[str, Any]] = []

    def add(what: str, found: Iterator[tuple[str, Measures]]) -> None:
        for model, measures in found:
            for name, (value, low, high) in measures.items():
                entry = {"name": f"{what}, {model}: {name}", "value": round(value, 4), "unit": "share"}
                results.append(entry | {"low": round(low, 4), "high": round(high, 4)})
            print(what, model, {name: round(value[0], 4) for name, value in measures.items()}, file=sys.stderr)

    add("composition", baselines(composition, targets, parts))
    limit = max(each["value"] for each in results if each["name"].endswith("accuracy"))
    for entry in args.embeddings:
        name, _, path = entry.partition("=")
        add(name, federation(args.table, name, Path(path), args.mlp))
        if args.beside:
            both = np.hstack([composition, rows_of(Path(path), proteins)])
            add(f"composition beside {name}", baselines(both, targets, parts))
    for each in results:
        if each["name"].endswith("accuracy"):
            each |= {"limit": limit, "ratio": round(each["value"] / limit, 3)}
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "proteins": {name: len(rows) for name, rows in parts.items()},
    }
    print(json.dumps({"benchmark": "scl_probe", "machine": machine, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
