from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fedbio.classifier import load_model
from fedbio.cli import main
from fedbio.proteins import Protein
from fedbio.results import METRICS_COLUMNS, PREDICTIONS_COLUMNS, EncoderInfo, read_party

WriteSite = Callable[..., tuple[Path, Path]]

QUICK = ["--mlp", "8", "--mlp", "8-4", "--seeds", "0", "1", "--rounds", "4", "--learning-rate", "0.01"]


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sources(write_site: WriteSite, proteins: list[Protein]) -> list[str]:
    """Two sites with the same 18 test proteins, as the command's first arguments."""
    one, two = write_site("site-1", proteins[:60]), write_site("site-2", proteins[:18] + proteins[60:])
    return ["train", str(one[0]), str(two[0]), "--embeddings", str(one[1]), str(two[1])]


def test_train_writes_the_results_of_a_party_and_the_best_model(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "central"
    assert main([*sources, "-o", str(output), *QUICK, "--json"]) == 0
    record = read_party(output / "party.json")
    assert (record.party, record.role) == ("central", "central")
    assert record.rounds.keys() == {"8", "8-4"}
    assert record.rounds["8"].keys() == {"0", "1"}
    assert record.settings["training"]["rounds"] == 4
    assert record.data is not None
    assert record.data.proteins == 90
    assert sum(record.data.counts.test.values()) == 18
    assert not record.data.synthetic
    assert len(record.remarks) == 1
    assert record.remarks[0].startswith("No training protein of: Cell membrane, Endoplasmic reticulum")

    metrics = _rows(output / "metrics.csv")
    assert tuple(metrics[0]) == METRICS_COLUMNS
    assert {(row["party"], row["split"], row["metric"]) for row in metrics} == {
        ("central", "train", "loss"),
        ("central", "validation", "accuracy"),
        ("central", "validation", "loss"),
        ("central", "test", "accuracy"),
        ("central", "test", "macro_f1"),
        ("central", "test", "mcc"),
        ("central", "test", "loss"),
    }
    tested = [row for row in metrics if (row["model"], row["seed"], row["split"]) == ("8-4", "1", "test")]
    assert {int(row["round"]) for row in tested} == {record.rounds["8-4"]["1"]}

    predictions = _rows(output / "predictions.csv")
    assert tuple(predictions[0]) == PREDICTIONS_COLUMNS
    assert len(predictions) == 18 * 4
    right = sum(row["predicted"] == row["target"] for row in predictions if (row["model"], row["seed"]) == ("8", "0"))
    accuracy = next(
        float(row["value"])
        for row in metrics
        if (row["model"], row["seed"], row["split"], row["metric"]) == ("8", "0", "test", "accuracy")
    )
    assert right / 18 == accuracy

    model = load_model(output / "model")
    assert model.card.mlp == record.best
    assert model.card.trained_by == ["central"]
    assert model.card.round == record.rounds[model.card.mlp][str(model.card.seed)]
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["best"] == record.best
    assert printed["model"]["encoder"]["weights_sha256"] == "a" * 64


def test_the_best_model_does_not_depend_on_how_many_are_trained_at_once(sources: list[str], tmp_path: Path) -> None:
    for threads in ("1", "3"):
        assert main([*sources, "-o", str(tmp_path / threads), *QUICK, "--threads", threads]) == 0
    for name in ("model/model.safetensors", "metrics.csv", "predictions.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


@pytest.mark.parametrize("key", ["config", "jobs"])
def test_settings_come_from_a_file_and_options_come_first(sources: list[str], tmp_path: Path, key: str) -> None:
    settings, output = tmp_path / "settings.yaml", tmp_path / "central"
    training = "training: {mlps: ['4'], seeds: [7], rounds: 2, epochs: 3}"
    content = {
        "config": f"dataset: demo\n{training}\n",
        "jobs": f"jobs:\n  - workflow: classify\n    {training}\n",
    }
    settings.write_text(content[key])
    assert main([*sources, "-o", str(output), "--settings", str(settings), "--rounds", "1"]) == 0
    record = read_party(output / "party.json")
    assert record.rounds == {"4": {"7": record.rounds["4"]["7"]}}
    assert (record.settings["training"]["rounds"], record.settings["training"]["epochs"]) == (1, 3)
    assert record.data is not None
    assert record.data.synthetic == (key == "config")


def test_set_puts_a_value_over_the_file(sources: list[str], tmp_path: Path) -> None:
    settings, output = tmp_path / "settings.yaml", tmp_path / "central"
    settings.write_text("dataset: mine.fasta\ntraining: {mlps: ['4'], seeds: [7], rounds: 2}\n")
    arguments = ["--settings", str(settings), "--set", 'training={"mlps": ["5"], "seeds": [1], "rounds": 1}']
    assert main([*sources, "-o", str(output), *arguments]) == 0
    assert read_party(output / "party.json").rounds.keys() == {"5"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "command line: rounds: expected a number >= 1"),
        (["--mlp", "32-x"], "expected one to eight layer widths joined by hyphens"),
        (["--dropout", "much", "--seeds", "a"], "command line: dropout: expected a number, found 'much'"),
        (["--set", "training.rounds=3"], "--set: puts values over a settings file; name it with --settings"),
    ],
)
def test_wrong_options_are_refused(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*sources, "-o", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_embeddings_file_is_needed_for_each_file(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sources[:-1], "-o", str(tmp_path / "out")]) == 2
    assert "--embeddings: 1 files for 2 files of proteins; give one for each" in capsys.readouterr().err


def test_a_file_of_test_proteins_only_is_refused(
    write_site: WriteSite, proteins: list[Protein], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta, store = write_site("site-1", proteins[:18])
    assert main(["train", str(fasta), "--embeddings", str(store), "-o", str(tmp_path / "out")]) == 2
    assert "site-1.fasta: no protein with SET=train; there is nothing to train on" in capsys.readouterr().err


def test_a_site_alone_without_test_and_validation_proteins_is_trained(
    write_site: WriteSite, proteins: list[Protein], tmp_path: Path, info: EncoderInfo
) -> None:
    fasta, store = write_site("site-1", proteins[18:40], encoder=msgspec.structs.replace(info, trained=True))
    output = tmp_path / "alone"
    arguments = ["--party", "site-1", "--validation-fraction", "0", "--mlp", "4", "--seeds", "0", "--rounds", "2"]
    assert main(["train", str(fasta), "--embeddings", str(store), "-o", str(output), *arguments]) == 0
    record = read_party(output / "party.json")
    assert (record.party, record.role, record.rounds) == ("site-1", "site", {"4": {"0": 2}})
    assert record.remarks[0] == "No validation proteins: the last round of each run was taken."
    assert {row["split"] for row in _rows(output / "metrics.csv")} == {"train"}
    assert _rows(output / "predictions.csv") == []
    assert load_model(output / "model").card.unsure_below == 1.0
