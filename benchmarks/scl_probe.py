"""What embeddings are worth for subcellular location, against features that need no encoder.

``python benchmarks/scl_probe.py mixed_soft.csv.gz --meta mixed_soft_meta.csv.gz --embeddings ends=ends.h5 --beside
--federated ends`` takes a table in FLIP's form, trains on its training part, chooses on its validation part, and
measures once on its test part:

- composition features (amino acids, dipeptides, the amino acids of terminal windows, the length) with gradient-boosted
  trees, with logistic regression, with an MLP, and with the mean of the three's probabilities;
- each embeddings file with the MLP, trained centrally with three seeds; for those named by ``--federated`` by three
  sites (Dirichlet, alpha 1) alone and together as well, in real processes over mutual TLS;
- with ``--beside``, composition and embeddings together, with the same models as composition alone, and the paired
  bootstrap interval of the difference.

Accuracy (Q10), macro F1 and MCC, each with a 95 % bootstrap interval over test proteins, and the accuracy on
validation, on which features may be chosen. With ``--meta`` everything is measured twice: with all rows, and without
the training and validation rows that the table flags as relatives of test proteins. ``--validation-only`` says what
validation says of central models, and nothing of the test part: it is for choosing among features, and among models. A
file with a row per residue goes with light attention (``--mlp la9x32-32``). A table for people comes before the last
line. Results of the federated runs stay in ``results/probe-NAME``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from _probe import (
    Classes,
    Features,
    Fitted,
    Parts,
    Scores,
    boosted_trees,
    central,
    compositions,
    logistic_regression,
    score,
    vote,
)
from _probe_account import Account
from _probe_sites import federation

from fedbio.classifier.data import check_sequences, load_features
from fedbio.classifier.residues import Residues
from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import Embeddings, sequence_digest
from fedbio.networks import input_problem
from fedbio.proteins import Protein, read
from fedbio.results import EncoderInfo
from fedbio.settings import TrainingSettings

COMPOSITION = "composition"
ALL, FAR = "all rows", "without relatives of test proteins"
NEAR = ("T", "TH")
"""Flags of ``near_test`` that speak of the test proteins; ``H`` speaks of others."""


@dataclass(frozen=True)
class Embedded:
    """An embeddings file."""

    name: str
    path: Path
    features: Features | Residues
    info: EncoderInfo


class Probe:
    """Measures one set of rows after the other."""

    def __init__(self, args: argparse.Namespace, proteins: list[Protein], embedded: list[Embedded]) -> None:
        self.args, self.proteins, self.embedded = args, proteins, embedded
        self.training = TrainingSettings(
            mlps=[args.mlp], seeds=args.seeds, rounds=args.rounds, learning_rate=args.learning_rate
        )
        self.composition = compositions([protein.sequence for protein in proteins])
        self.account = Account()
        self.counts: dict[str, dict[str, int]] = {}

    def measure(self, rows: str, parts: Parts) -> None:
        """Train and measure everything that was asked for with these rows."""
        args, account = self.args, self.account
        self.counts[rows] = {name: len(getattr(parts, name)) for name in ("train", "validation", "test")}
        if args.validation_only:
            self._choose(rows, parts)
            return
        targets = parts.targets[parts.test]
        plain = {each.model: (each, score(targets, each.predicted)) for each in self._fit(None, parts)}
        best = _chosen(plain)
        limit = float(best[1]["accuracy"][0])
        for fitted, scores in plain.values():
            account.add(rows, COMPOSITION, fitted, scores, limit)
        candidates: list[tuple[float, dict[str, Any]]] = []
        for each in self.embedded:
            for fitted in self._alone(each, parts, rows):
                scores = score(targets, fitted.predicted)
                account.add(rows, each.name, fitted, scores, limit)
                for model in dict.fromkeys([best[0].model, "boosted trees"]):
                    what = f"{each.name}, {fitted.model}, minus {COMPOSITION}, {model}"
                    account.add_difference(rows, what, scores, plain[model][1])
            if not args.beside:
                continue
            both = {fitted.model: (fitted, score(targets, fitted.predicted)) for fitted in self._fit(each, parts)}
            for model, (fitted, scores) in both.items():
                account.add(rows, f"{COMPOSITION} beside {each.name}", fitted, scores, limit)
                what = f"{COMPOSITION} beside {each.name} minus {COMPOSITION}, both {model}"
                account.add_difference(rows, what, scores, plain[model][1])
            beside = _chosen(both)
            what = f"{COMPOSITION} beside {each.name} minus {COMPOSITION}, each the best on validation"
            entry = account.add_difference(rows, what, beside[1], best[1])
            if each.info.trained:
                candidates.append((beside[0].validation, entry))
        if candidates and rows == ALL:
            _, entry = max(candidates, key=lambda candidate: candidate[0])
            # what an encoder must be good for: the features that validation prefers are better than none
            entry |= {"goal": 0.0, "met": entry["low"] > 0}

    def _choose(self, rows: str, parts: Parts) -> None:
        """Say what validation says of central models on each kind of features."""
        for each in self.embedded:
            self.account.add(rows, each.name, central(each.features, parts, self.training), None)
        if self.args.beside:
            for more in (None, *self.embedded):
                name = COMPOSITION if more is None else f"{COMPOSITION} beside {more.name}"
                for fitted in self._fit(more, parts):
                    self.account.add(rows, name, fitted, None)

    def _fit(self, embedded: Embedded | None, parts: Parts) -> Iterator[Fitted]:
        """Train the models that composition has, with and without embeddings beside it."""
        more = None if embedded is None else embedded.features
        assert not isinstance(more, Residues), "nothing can stand beside residues"
        both = self.composition if more is None else np.hstack([self.composition, more])
        models = [boosted_trees(self.composition, more, parts)]
        models += [logistic_regression(both, parts), central(both, parts, self.training)]
        yield from models
        yield vote(models, parts)

    def _alone(self, embedded: Embedded, parts: Parts, rows: str) -> Iterator[Fitted]:
        """Train the MLP on embeddings alone."""
        if embedded.name in self.args.federated:
            run = Path("results", f"probe-{embedded.name}" + ("" if rows == ALL else "-far"))
            dealt = [self.proteins[row] for row in sorted([*parts.train, *parts.validation, *parts.test])]
            test = [self.proteins[row].id for row in parts.test]
            yield from federation(run, dealt, embedded.path, test, self.training)
        yield central(embedded.features, parts, self.training)


def _chosen(models: dict[str, tuple[Fitted, Scores]]) -> tuple[Fitted, Scores]:
    return max(models.values(), key=lambda each: each[0].validation)


def split(proteins: list[Protein]) -> Parts:
    """Return the parts that the table names."""
    part = np.array(["validation" if each.validation else each.set for each in proteins])
    targets = np.array([COMPARTMENTS.index(str(each.target)) for each in proteins], np.int64)
    places = {name: np.flatnonzero(part == name) for name in ("train", "validation", "test")}
    if missing := [name for name, rows in places.items() if not len(rows)]:
        raise SystemExit(f"the table has no protein for {' and '.join(missing)}")
    return Parts(targets, **places)


def far(parts: Parts, proteins: list[Protein], meta: Path) -> Parts:
    """Leave the training and validation rows out that are flagged as relatives of test proteins."""
    with gzip.open(meta, "rt", newline="") if meta.suffix == ".gz" else open(meta, newline="") as file:
        flags = {row["id"]: row["near_test"] for row in csv.DictReader(file)}

    def keep(rows: Classes) -> Classes:
        if missing := [proteins[row].id for row in rows if proteins[row].id not in flags]:
            raise SystemExit(f"{meta}: says nothing of {missing[0]}")
        return rows[[flags[proteins[row].id] not in NEAR for row in rows]]

    return replace(parts, train=keep(parts.train), validation=keep(parts.validation))


def load(named: str, proteins: list[Protein], stack: ExitStack) -> Embedded:
    """Read the embeddings of the proteins, in their order; ``NAME=H5`` says which. Residues stay in their file."""
    name, _, path = named.partition("=")
    if not path or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise SystemExit(f"--embeddings {named}: expected NAME=H5 with a name of letters, digits, dots and dashes")
    store = stack.enter_context(Embeddings.open(path))
    check_sequences(store, {protein.id: sequence_digest(protein.sequence) for protein in proteins})
    features = load_features(store, [protein.id for protein in proteins], TrainingSettings().attention_residues)
    return Embedded(name, Path(path), features, store.info)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="proteins with labels in FLIP's form")
    parser.add_argument("--meta", type=Path, metavar="FILE", help="CSV with id and near_test: also without relatives")
    parser.add_argument(
        "--embeddings", action="append", default=[], metavar="NAME=H5", help="embeddings of these proteins; repeatable"
    )
    parser.add_argument("--beside", action="store_true", help="also embeddings beside the composition features")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--validation-only", action="store_true", help="only central models, without a look at the test part"
    )
    mode.add_argument(
        "--federated", action="append", default=[], metavar="NAME", help="embeddings to federate with; repeatable"
    )
    parser.add_argument(
        "--mlp", default="256-128-64", help="hidden layers of the MLP, or light attention (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=TrainingSettings().learning_rate,
        help="of the MLP (default: %(default)s)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the MLP (default: 0 1 2)")
    parser.add_argument("--rounds", type=int, default=30, help="the most rounds of its training (default: %(default)s)")
    args = parser.parse_args()
    names = {each.partition("=")[0] for each in args.embeddings}
    if unknown := [name for name in args.federated if name not in names]:
        parser.error(f"--federated {unknown[0]}: --embeddings names {', '.join(sorted(names)) or 'none'}")
    if len(names) != len(args.embeddings):
        parser.error("--embeddings: give each file a name of its own")
    return args


def main() -> int:
    """Measure and print."""
    args = options()
    proteins = [each for each in read(args.table) if each.target is not None]
    with ExitStack() as stack:
        embedded = [load(named, proteins, stack) for named in args.embeddings]
        for each in embedded:
            if problem := input_problem([args.mlp], each.info.pooling):
                raise SystemExit(f"{each.path}: {problem}")
        if any(isinstance(each.features, Residues) for each in embedded) and (args.beside or args.federated):
            raise SystemExit("--beside and --federated are for files with a row per protein")
        probe = Probe(args, proteins, embedded)
        parts = split(proteins)
        probe.measure(ALL, parts)
        if args.meta:
            probe.measure(FAR, far(parts, proteins, args.meta))
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    about = {"embeddings": {each.name: msgspec.to_builtins(each.info) for each in probe.embedded}}
    about |= {"proteins": probe.counts, "training": probe.training.model_dump(mode="json")}
    print(probe.account.table())
    print(json.dumps({"benchmark": "scl_probe", "machine": machine, **about, "results": probe.account.results}))
    return 0 if all(each["met"] for each in probe.account.results) else 1


if __name__ == "__main__":
    sys.exit(main())
