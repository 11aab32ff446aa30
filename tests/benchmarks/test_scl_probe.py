"""Tests of the probe: its measures, its fairness, and the script from a table to its last line."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.classifier import accuracy, confusion_matrix, macro_f1, mcc
from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import sequence_digest, write_embeddings
from fedbio.proteins import Protein, read
from fedbio.results import EncoderInfo

SITES = ("site-1", "site-2", "site-3")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENCODER = EncoderInfo("small", "1" * 64, True, 16, "mean", 1, "float32", 128, "cut")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of the probe."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_probe")


def test_scores_are_the_classifiers_own_measures_and_their_mean_over_runs(probe: Any) -> None:
    random = np.random.default_rng(0)
    targets, predicted = random.integers(0, 4, 60), random.integers(0, 4, (2, 60))
    predicted[1, :40] = targets[:40]
    scores = probe.score(targets, predicted)
    matrices = [confusion_matrix(targets, each, len(COMPARTMENTS)) for each in predicted]
    for name, measure in (("accuracy", accuracy), ("macro_f1", macro_f1), ("mcc", mcc)):
        assert scores[name][0] == pytest.approx(np.mean([measure(matrix) for matrix in matrices]))
        value, low, high = probe.interval(scores[name])
        assert low < value < high


def test_differences_are_resampled_in_pairs(probe: Any) -> None:
    random = np.random.default_rng(1)
    targets, one = random.integers(0, 4, 400), random.integers(0, 4, (1, 400))
    other = one.copy()
    other[0, :10] = targets[:10]  # a little better on the same proteins
    first, second = probe.score(targets, other), probe.score(targets, one)
    _, low, high = probe.interval(first["accuracy"] - second["accuracy"])
    widths = [np.subtract(*probe.interval(each["accuracy"])[:0:-1]) for each in (first, second)]
    assert low >= 0
    assert high - low < 0.5 * min(widths)


def test_compositions_see_the_ends(probe: Any) -> None:
    one, other = probe.compositions(["MKRS" * 30 + "DE" * 30, "DE" * 30 + "MKRS" * 30])
    assert one.shape == (20 + 400 + 8 * 20 + 1,)
    np.testing.assert_allclose(one[:20], other[:20])
    # the window of the first ten, then that of the last ten
    np.testing.assert_allclose(one[420:460].reshape(2, 20)[1].nonzero()[0], [2, 3])
    np.testing.assert_allclose(other[420:460].reshape(2, 20)[0].nonzero()[0], [2, 3])


def test_models_vote_with_their_probabilities(probe: Any) -> None:
    parts = probe.Parts(np.array([0, 1, 1, 0, 1]), np.array([0]), np.array([1, 2]), np.array([3, 4]))
    sure = np.array([[0.1, 0.9], [0.2, 0.8]]), np.array([[0.9, 0.1], [0.9, 0.1]])
    unsure = np.array([[0.6, 0.4], [0.6, 0.4]]), np.array([[0.4, 0.6], [0.4, 0.6]])
    wrong = np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([[0.1, 0.9], [0.0, 1.0]])
    models = [
        probe.Fitted(name, 0.0, np.zeros((1, 2)), each) for name, each in zip("abc", (sure, unsure, wrong), strict=True)
    ]
    assert probe.vote(models[:2], parts).validation == 1.0
    found = probe.vote(models, parts)
    assert found.validation == 0.0
    np.testing.assert_array_equal(found.predicted, [[1, 1]])


def write_rows(path: Path, proteins: list[Protein], *, signal: float) -> None:
    """Embeddings that know the location a little."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(len(proteins), ENCODER.width))
    for row, protein in zip(rows, proteins, strict=True):
        row[COMPARTMENTS.index(protein.target or "")] += signal
    write_embeddings(
        path,
        info=ENCODER,
        ids=[each.id for each in proteins],
        lengths=[len(each.sequence) for each in proteins],
        digests=[sequence_digest(each.sequence) for each in proteins],
        blocks=iter([rows.astype(np.float32)]),
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Demo proteins with two embeddings files, a good one and a useless one, and a list of relatives."""
    demo = [sys.executable, "-m", "fedbio", "data", "demo", "-o", str(tmp_path / "proteins.fasta"), "--count", "300"]
    subprocess.run([*demo, "--difficulty", "0.8"], check=True, capture_output=True, timeout=60)
    proteins = list(read(tmp_path / "proteins.fasta"))
    write_rows(tmp_path / "good.h5", proteins, signal=3.0)
    write_rows(tmp_path / "useless.h5", proteins, signal=0.0)
    with open(tmp_path / "meta.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "near_test"])
        # every flag there is, on rows of every part; H is no relative of a test protein
        writer.writerows((each.id, ["", "T", "TH", "H"][number % 4]) for number, each in enumerate(proteins))
    return tmp_path / "proteins.fasta"


def run(table: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Run the script in the table's folder; return its exit code, the tables, and the last line."""
    command = [sys.executable, str(BENCHMARKS / "scl_probe.py"), table.name, "--meta", "meta.csv", "--mlp", "32"]
    done = subprocess.run(
        [*command, "--seeds", "0", "1", "--rounds", "12", *options],
        cwd=table.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stdout, done.stderr
    *tables, last = done.stdout.splitlines()
    return done.returncode, "\n".join(tables), json.loads(last)


def values(account: dict[str, Any], **about: str) -> list[float]:
    """The accuracies of the results that are about this."""
    found = [each for each in account["results"] if about.items() <= each.items()]
    return [each["value"] for each in found if each["name"].endswith("accuracy")]


@pytest.mark.slow
def test_features_are_compared_centrally_with_and_without_relatives(table: Path) -> None:
    code, tables, account = run(
        table, "--validation-only", "--embeddings", "good=good.h5", "--embeddings", "bad=useless.h5"
    )
    assert code == 0
    proteins = list(read(table))
    kept = [number for number, each in enumerate(proteins) if number % 4 in (0, 3) and each.set == "train"]
    counts = account["proteins"]["without relatives of test proteins"]
    assert counts["train"] + counts["validation"] == len(kept)
    assert counts["test"] == account["proteins"]["all rows"]["test"] == sum(each.set == "test" for each in proteins)
    assert {each["model"] for each in account["results"]} == {"central MLP"}
    # features are chosen by validation, and the test part stays unseen
    assert {each["split"] for each in account["results"]} == {"validation"}
    for rows in account["proteins"]:
        (good,) = values(account, rows=rows, features="good")
        (bad,) = values(account, rows=rows, features="bad")
        assert good > bad + 0.1
        assert f"{good:.3f}" in tables
    assert account["embeddings"]["good"]["name"] == "small"


@pytest.mark.slow
def test_federated_models_and_baselines_are_measured_on_the_same_test_proteins(table: Path) -> None:
    code, tables, account = run(table, "--embeddings", "good=good.h5", "--beside", "--federated", "good")
    for rows in account["proteins"]:
        fitted = {
            each["model"] for each in account["results"] if each.get("features") == "good" and each["rows"] == rows
        }
        assert fitted == {"local MLP, mean of the sites", "federated MLP", "central MLP"}
        for features in ("composition", "composition beside good"):
            for split in ("validation", "test"):
                assert len(values(account, rows=rows, split=split, features=features)) == 4
    (goal,) = [each for each in account["results"] if each["goal"] is not None]
    assert goal["name"].startswith("composition beside good minus composition, each the best on validation, all rows")
    assert goal["met"] == (goal["low"] > 0) == (code == 0)
    assert goal["value"] > 0
    for model in ("boosted trees", "logistic regression", "central MLP", "vote of all"):
        assert f"| all rows | composition beside good minus composition, both {model} |" in tables
    for model in ("local MLP, mean of the sites", "federated MLP", "central MLP"):
        assert f"| all rows | good, {model}, minus composition, boosted trees |" in tables
    for folder, rows in (("probe-good", "all rows"), ("probe-good-far", "without relatives of test proteins")):
        results = table.parent / "results" / folder
        dealt = {each.id for path in (results / "data").iterdir() for each in read(path)}
        assert len(dealt) == sum(account["proteins"][rows].values())
        # what the parties themselves have measured
        for model, parties in (("federated MLP", ["federated"]), ("local MLP, mean of the sites", SITES)):
            for split in ("validation", "test"):
                (value,) = values(account, rows=rows, split=split, features="good", model=model)
                assert value == pytest.approx(np.mean(best_accuracies(results, parties, split)), abs=1e-4)


def best_accuracies(results: Path, parties: Sequence[str], split: str) -> list[float]:
    """The best accuracy of each party with each seed in its metrics; on test there is one."""
    found: dict[tuple[str, str], float] = {}
    for path in results.glob("*/metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            if (row["split"], row["metric"]) == (split, "accuracy") and row["party"] in parties:
                key = row["party"], row["seed"]
                found[key] = max(found.get(key, 0.0), float(row["value"]))
    assert len(found) == 2 * len(parties)
    return list(found.values())
