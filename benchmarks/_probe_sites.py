"""Have sites train the MLP as a federation does it, and read what came out: a part of `scl_probe.py`."""

from __future__ import annotations

__all__ = ["federation"]

import csv
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from _probe import Fitted

from fedbio.compartments import COMPARTMENTS
from fedbio.proteins import Protein, partition, write_fasta
from fedbio.settings import TrainingSettings

SITES = ("site-1", "site-2", "site-3")
ALPHA = 1.0
FEDERATED = "federated"

Said = dict[tuple[str, str], dict[str, str]]
"""By party and seed: the predicted location of each test protein."""


def federation(
    run: Path, proteins: Sequence[Protein], embeddings: Path, test: Sequence[str], training: TrainingSettings
) -> Iterator[Fitted]:
    """Have three sites (Dirichlet, alpha 1) train alone and together: processes of their own over mutual TLS.

    Parameters
    ----------
    run : Path
        Folder for what the parties keep; one of a run before is replaced.
    proteins : sequence of Protein
        Dealt out to the sites; each gets all test proteins.
    embeddings : Path
        Embeddings file of all of them, which the sites find in their folders.
    test : sequence of str
        Ids of the test proteins, in the order of the predictions.
    training : TrainingSettings
        One MLP, and its seeds.

    Yields
    ------
    Fitted
        Alone, where each site with each seed is a run, and validation is on the proteins that it holds itself; then
        federated, where it is on those of all sites.
    """
    shutil.rmtree(run, ignore_errors=True)
    (run / "data").mkdir(parents=True)
    for site, held in partition(proteins, SITES, alpha=ALPHA, seed=0).items():
        write_fasta(held, run / "data" / f"{site}.fasta")
        (run / site).mkdir()
        (run / site / "embeddings.h5").symlink_to(embeddings.resolve())
    jobs = run / "jobs.json"
    jobs.write_text(json.dumps({"jobs": [{"workflow": "classify", "training": training.model_dump(mode="json")}]}))
    command = [sys.executable, "-m", "fedbio", "simulate", str(jobs), "--sites", str(len(SITES))]
    subprocess.run([*command, "--data", str(run / "data"), "-o", str(run)], check=True, stdout=sys.stderr)
    said, chosen = _predictions(run), _validation(run)
    for title, together in (("local MLP, mean of the sites", False), ("federated MLP", True)):
        keys = [key for key in sorted(said) if (key[0] == FEDERATED) == together]
        expected = len(training.seeds) * (1 if together else len(SITES))
        assert len(keys) == expected, f"{run}: {len(keys)} models instead of {expected}"
        predicted = np.array([[COMPARTMENTS.index(said[key][name]) for name in test] for key in keys])
        yield Fitted(title, fmean(chosen[key] for key in keys), predicted)


def _predictions(run: Path) -> Said:
    said: Said = defaultdict(dict)
    for path in sorted(run.glob("*/predictions.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                said[row["party"], row["seed"]][row["id"]] = row["predicted"]
    return said


def _validation(run: Path) -> dict[tuple[str, str], float]:
    """By party and seed: accuracy on validation proteins in the best round, which is the one that was kept."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for path in sorted(run.glob("*/metrics.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if (row["split"], row["metric"]) == ("validation", "accuracy"):
                    key = row["party"], row["seed"]
                    found[key] = max(found[key], float(row["value"]))
    return found
