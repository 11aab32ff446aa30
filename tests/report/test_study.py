"""Accuracies, gains and scores equal those computed by hand on four proteins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedbio.report import Study, collect, study, summarize, write_summary
from fedbio.results import (
    METRICS_COLUMNS,
    METRICS_FILE,
    PREDICTIONS_COLUMNS,
    PREDICTIONS_FILE,
    ClassCounts,
    DataRecord,
    EncoderInfo,
    Metric,
    PartyRecord,
    Prediction,
    Traffic,
    write_party,
    write_table,
)

ENCODER = EncoderInfo("small", "0" * 64, True, 4, "mean", 1, "float32", 128, "cut")
TARGETS = "AAAB"
ANSWERS = {"site-1": "AABA", "site-2": "AAAA", "federated": "AAAB", "central": "AABB"}
# right:             2 of 4           3 of 4            4 of 4               3 of 4


def write(folder: Path, answers: dict[tuple[str, str, int], str], **options: object) -> Path:
    """Write a run of two sites and a central model; `answers` by (party, MLP, seed)."""
    for workspace, seconds, sent in (
        ("site-1", {"embed": 2.0, "train": 5.0}, {"model": Traffic(3, 900), "counts": Traffic(1, 40)}),
        ("site-2", {"embed": 3.0, "train": 4.0}, {"model": Traffic(3, 901)}),
        ("central", {"train": 6.0}, {}),
    ):
        role = "central" if workspace == "central" else "site"
        data = DataRecord(f"{workspace}.fasta", False, 9, 900, 0, ClassCounts(train={"A": 3, "B": 2}, test={"A": 3}))
        write_party(
            folder / workspace,
            PartyRecord(
                party=workspace, role=role, classes=["A", "B"], encoder=ENCODER, data=data, seconds=seconds, sent=sent,
                **options,
            ),
        )  # fmt: skip
        tells = {"central": ("central",)}.get(workspace, (workspace, "federated"))
        write_table(
            folder / workspace / PREDICTIONS_FILE,
            PREDICTIONS_COLUMNS,
            [
                Prediction(f"P{index}", target, party, mlp, seed, said, 0.9)
                for (party, mlp, seed), row in answers.items()
                if party in tells
                for index, (target, said) in enumerate(zip(TARGETS, row, strict=True))
            ],
        )
        write_table(
            folder / workspace / METRICS_FILE,
            METRICS_COLUMNS,
            [
                Metric("federated", mlp, "validation", seed, 0, "accuracy", 0.9 if mlp == "8-4" else 0.8)
                for party, mlp, seed in answers
                if party == "federated"
            ],
        )
    return folder


@pytest.fixture
def four(tmp_path: Path) -> Study:
    return study(collect(write(tmp_path, {(party, "2", 0): row for party, row in ANSWERS.items()})))


def test_accuracies_of_four_proteins(four: Study) -> None:
    found = four.accuracies["2"]
    assert found.local is not None
    assert found.gain is not None
    assert found.central is not None
    assert found.local.value == 0.625
    assert found.federated.value == 1.0
    assert found.gain.value == 0.375
    assert found.central.value == 0.75
    assert found.majority.value == 0.75
    assert (found.federated.low, found.federated.high) == (1.0, 1.0)
    assert found.scores == {"site-1": {0: 0.5}, "site-2": {0: 0.75}, "federated": {0: 1.0}, "central": {0: 0.75}}
    assert four.majority_class == "A"


def test_size_of_a_classifier_counts_weights_and_biases(four: Study) -> None:
    assert four.accuracies["2"].weights == (4 + 1) * 2 + (2 + 1) * 2


def test_gain_of_each_site(four: Study) -> None:
    assert {name: site.gain.value for name, site in four.accuracies["2"].sites.items()} == {
        "site-1": 0.5,
        "site-2": 0.25,
    }


def test_f1_of_each_class(four: Study) -> None:
    a, b = four.class_scores
    assert a.local is not None
    assert a.federated is not None
    assert a.central is not None
    assert b.local is not None
    assert b.gain is not None
    assert a.local.value == pytest.approx((4 / 6 + 6 / 7) / 2)  # 2 TP / (named + there), mean over sites
    assert a.federated.value == 1.0
    assert a.central.value == pytest.approx(4 / 5)
    assert (b.local.value, b.gain.value) == (0.0, 1.0)
    assert (a.test_proteins, b.test_proteins) == (3, 1)
    # resamples without a protein of the class, (3/4)**4 of them, say nothing about it
    assert b.gain.resamples == pytest.approx(2000 * (1 - 0.75**4), abs=100)


def test_confusion_counts_true_classes_in_rows(tmp_path: Path) -> None:
    found = study(collect(write(tmp_path, {("federated", "2", 0): "AABA", ("federated", "2", 1): "AAAA"})))
    np.testing.assert_array_equal(found.confusion, [[2.5, 0.5], [1.0, 0.0]])


def test_means_are_over_seeds(tmp_path: Path) -> None:
    answers = {
        ("site-1", "2", 0): "AAAA",
        ("site-1", "2", 1): "ABBA",
        ("federated", "2", 0): "AAAB",
        ("federated", "2", 1): "AAAA",
    }
    found = study(collect(write(tmp_path, answers))).accuracies["2"]
    assert found.local is not None
    assert (found.local.value, found.federated.value) == (0.5, 0.875)


def test_best_is_chosen_on_validation_and_never_on_test(tmp_path: Path) -> None:
    answers = {("federated", "2", 0): "AAAB", ("federated", "8-4", 0): "BBBA"}  # validation says 0.8 and 0.9
    found = study(collect(write(tmp_path, answers)))
    assert (found.best, found.best_known) == ("8-4", True)
    assert list(found.accuracies) == ["2", "8-4"]


def test_best_is_what_the_parties_recorded(tmp_path: Path) -> None:
    answers = {("federated", "2", 0): "AAAB", ("federated", "8-4", 0): "BBBA"}
    assert study(collect(write(tmp_path, answers, best="2"))).best == "2"


def test_without_models_of_sites_there_is_no_gain(tmp_path: Path) -> None:
    found = study(collect(write(tmp_path, {("federated", "2", 0): "AABB"}))).accuracies["2"]
    assert (found.local, found.gain, found.central) == (None, None, None)
    assert found.federated.value == 0.75


def test_summary_has_the_agreed_form(four: Study) -> None:
    content = json.loads(write_summary(four).read_text())
    accuracy = content["accuracy"]["2"]
    assert accuracy["majority"]["value"] == 0.75
    assert accuracy["federated"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert accuracy["gain"]["value"] == 0.375
    assert list(accuracy) == ["local_mean", "federated", "central", "majority", "gain"]
    assert list(content) == ["accuracy", "best", "seconds", "encoder", "bytes_left"]
    assert content["best"] == "2"
    assert content["seconds"] == {"embed": 3.0, "train": 6.0}
    assert content["encoder"]["weights_sha256"] == "0" * 64
    assert content["bytes_left"] == {"site-1": {"model": 900, "counts": 40}, "site-2": {"model": 901}}


def test_summary_of_a_run_without_a_central_model_says_null(invent: Callable[..., Path]) -> None:
    content = summarize(study(collect(invent(central=False))))
    assert content["accuracy"]["32"]["central"] is None


def test_sites_with_different_test_proteins_are_compared_each_on_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, {(party, "2", 0): row for party, row in ANSWERS.items()})
    rows = [
        Prediction("Q0", "B", "site-2", "2", 0, "A", 0.9),
        Prediction("Q1", "B", "site-2", "2", 0, "B", 0.9),
        Prediction("Q0", "B", "federated", "2", 0, "A", 0.9),
        Prediction("Q1", "B", "federated", "2", 0, "A", 0.9),
    ]
    write_table(folder / "site-2" / PREDICTIONS_FILE, PREDICTIONS_COLUMNS, rows)
    sites = study(collect(folder)).accuracies["2"].sites
    assert {name: (site.local.value, site.federated.value) for name, site in sites.items()} == {
        "site-1": (0.5, 1.0),
        "site-2": (0.5, 0.0),
    }
