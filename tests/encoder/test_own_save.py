"""Tests of encoders that we trained as they are given away: rounded, with account and card, found by name, verified."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fedbio import encoder_names
from fedbio.cli import main
from fedbio.encoder import embed_file
from fedbio.encoder.checkpoint import read_encoder
from fedbio.encoder.untrained import untrained_weights
from fedbio.errors import FormatError
from fedbio.files import write_whole
from fedbio.model_card import UNWRITTEN
from fedbio.weights import EncoderConfig, head_shapes, read_weights, weights_digest, write_weights

CONFIG = EncoderConfig(name="run", layers=2, heads=2, width=32, ffn=64, max_tokens=66)
CURVE = [
    {"step": step, "tokens": 500 * step, "perplexity": 130 / (1 + step), "masked": 90, "final": step == 30}
    for step in range(31)
]
MAX_BYTES = 45_000_000


def account(sha256: str) -> dict[str, Any]:
    return {
        "format": "fedbio-training",
        "version": 1,
        "encoder": "run",
        "weights_sha256": sha256,
        "parameters": 25_000,
        "finished": True,
        "from": None,
        "step": 30,
        "tokens": 15_000,
        "seconds": 7200.0,
        "recipe": {"learning_rate": 0.002, "steps": 30, "average": "tail"},
        "corpus": {
            "sources": [{"name": "euk.fasta", "bytes": 1234, "changed_ns": 17, "sha256": "ab" * 32}],
            "excluded_sources": [{"name": "test.fasta", "bytes": 56, "changed_ns": 18, "sha256": "cd" * 32}],
            "proteins": {"train": 1000, "valid": 10},
            "residues": {"train": 300_000, "valid": 3_000},
            "excluded": 4,
            "sha256": {"train": "ef" * 32},
        },
        "curve": CURVE,
        "stretches": [{"step": 0, "device": "cpu", "threads": 2, "processes": 1}] * 2,
        "software": {"fedbio": "0.1.0"},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished `fedbio pretrain` leaves behind."""
    folder = tmp_path / "run"
    random = np.random.default_rng(3)
    weights = untrained_weights(CONFIG, 1)
    weights |= {name: random.normal(size=shape).astype(np.float32) for name, shape in head_shapes(CONFIG).items()}
    write_weights(folder, CONFIG, weights)
    write_whole(folder / "training.json", json.dumps(account(weights_digest(weights))))
    for name in ("corpus", "checkpoints", "tensorboard"):
        (folder / name).mkdir()
        (folder / name / "large").touch()
    (folder / "metrics.jsonl").touch()
    return folder


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that holds other encoders than this one."""
    monkeypatch.setattr("fedbio.encoder_names.PACKAGED", tmp_path / "installed")
    monkeypatch.setenv("FEDBIO_ENCODERS", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "installed"


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["encoder", "convert", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_run_becomes_a_folder_to_give_away(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    told = convert(capsys, run, "-o", output, "--weights", "float16", "--name", "mini")
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training.json", "vocab.txt",
    ]  # fmt: skip
    config, weights = read_weights(output)
    assert config.name == "mini"
    assert told["weights_sha256"] == weights_digest(weights) != read_encoder(run).sha256
    assert (told["weights"], told["bytes"]) == ("float16", (output / "model.safetensors").stat().st_size)
    kept = json.loads((output / "training.json").read_text())
    assert kept["weights_sha256"] == told["weights_sha256"]
    assert kept["weights"] == {
        "form": "float16", "bytes": told["bytes"], "original_sha256": read_encoder(run).sha256,
    }  # fmt: skip
    assert kept["encoder"] == "mini"
    assert kept["curve"] == CURVE
    assert "changed_ns" not in json.dumps(kept)
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


def test_the_digest_of_the_original_survives_a_second_rounding(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = convert(capsys, run, "-o", tmp_path / "half", "--weights", "float16")
    second = convert(capsys, tmp_path / "half", "-o", tmp_path / "bytes", "--weights", "int8")
    assert second["bytes"] < first["bytes"]
    kept = json.loads((tmp_path / "bytes" / "training.json").read_text())
    assert kept["weights"]["original_sha256"] == read_encoder(run).sha256
    assert read_encoder(tmp_path / "bytes").sha256 == kept["weights_sha256"] == second["weights_sha256"]


def test_the_card_says_what_the_account_does_and_keeps_what_was_written_by_hand(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["encoder", "convert", str(run), "-o", str(output), "--weights", "float16"]) == 0
    assert f"README.md: a model card; where it says '{UNWRITTEN}', only you can" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert read_encoder(output).sha256 in card
    assert f"had the SHA-256 `{read_encoder(run).sha256}`" in card
    assert f"| learnt from | euk.fasta | 1,234 | `{'ab' * 32}` |" in card
    assert f"| kept away from | test.fasta | 56 | `{'cd' * 32}` |" in card
    assert "1,000 proteins (300,000 residues) to learn from, 10 proteins (3,000 residues) held out. 4 proteins" in card
    assert f"one a line and in the order of the files: `{'ef' * 32}`" in card
    assert "| learning_rate | 0.002 |" in card
    assert "30 updates in 2.0 hours on cpu, calls: 2" in card
    assert "| 0 | 0 | 130.00 | 90 |" in card
    assert "| 30 | 15,000 | 4.19 | 90 |" in card
    assert card.count("| 90 |") == 24  # a longer curve is thinned out
    assert card.count(UNWRITTEN) == 2
    (output / "README.md").write_text(
        card.replace(f"{UNWRITTEN}: from which", "UniProt, CC BY 4.0:").replace(f"{UNWRITTEN}: what", "Good \\1:")
    )
    assert main(["encoder", "convert", str(run), "-o", str(output), "--weights", "int8"]) == 0
    again = (output / "README.md").read_text()
    assert "UniProt, CC BY 4.0: collections" in again
    assert "Good \\1: a classifier" in again
    assert UNWRITTEN not in again
    assert read_encoder(output).sha256 in again
    assert read_encoder(output).sha256 not in card


def test_a_readme_of_another_kind_is_left_alone(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for _ in range(2):
        assert main(["encoder", "convert", str(run), "-o", str(output)]) == 0
        (output / "README.md").write_text("my notes")
    assert main(["encoder", "convert", str(run), "-o", str(output)]) == 0
    assert (output / "README.md").read_text() == "my notes"


def test_an_encoder_without_an_account_leaves_none_of_another(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["encoder", "convert", str(run), "-o", str(output)]) == 0
    (run / "training.json").unlink()
    write_weights(run, CONFIG, untrained_weights(CONFIG, 2))
    assert main(["encoder", "convert", str(run), "-o", str(output)]) == 0
    assert not (output / "training.json").exists()
    assert read_encoder(output).account is None


def test_an_encoder_is_not_written_over_itself_and_not_rounded_for_hugging_face(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encoder", "convert", str(run), "-o", str(run), "--weights", "int8"]) == 2
    assert "this is the encoder itself; give a new folder" in capsys.readouterr().err
    assert (
        main(["encoder", "convert", str(run), "-o", str(tmp_path / "x"), "--to", "huggingface", "--weights", "int8"])
        == 2
    )
    assert "--weights int8: folders of Hugging Face are written as float32; leave it out" in capsys.readouterr().err


def test_what_comes_with_fedbio_is_listed_shown_and_embeds_by_name(
    run: Path, packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    convert(capsys, run, "-o", packaged / "mini", "--weights", "float16", "--name", "mini")
    assert main(["encoder", "list"]) == 0
    assert capsys.readouterr().out.startswith("mini ")
    assert main(["encoder", "list", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["encoders"][0]
    assert row["summary"] == "25,000 parameters, trained on 15,000 tokens, perplexity 4.19"
    assert (row["origin"], row["tokens"]) == ("comes with fedbio", 15_000)
    assert main(["encoder", "show", "mini"]) == 0
    shown = capsys.readouterr().out
    assert "kept as float16, 0.1 MB\ntrained on 15,000 tokens, perplexity 4.19 (masked residues of" in shown
    (tmp_path / "one.fasta").write_text(">p\nMKVLA\n")
    caplog.set_level(logging.INFO)
    report = embed_file(tmp_path / "one.fasta", tmp_path / "one.h5", encoder="mini", threads=1)
    assert (report.encoder.name, report.encoder.perplexity) == ("mini", pytest.approx(130 / 31))
    assert not [message for message in caplog.messages if "untrained" in message]
    with h5py.File(tmp_path / "one.h5") as file:
        assert file.attrs["perplexity"] == pytest.approx(130 / 31)
        assert file.attrs["weights_sha256"] == read_encoder(packaged / "mini").sha256
    # another installation may tell another perplexity of the same weights, or none: the file is as good
    (packaged / "mini" / "training.json").unlink()
    again = embed_file(tmp_path / "one.fasta", tmp_path / "one.h5", encoder="mini", threads=1)
    assert (again.reused, again.encoder.perplexity) == (1, None)


def test_a_damaged_encoder_is_refused_by_name_with_the_remedy(
    run: Path, packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(capsys, run, "-o", packaged / "mini", "--weights", "float16")
    path = packaged / "mini" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        FormatError, match=r"mini: its weights have SHA-256 .* one of them is damaged.*; install fedbio ag"
    ):
        read_encoder("mini")
    with pytest.raises(FormatError, match=r"get the folder again, or, .* take training\.json away"):
        read_encoder(packaged.rename(tmp_path / "moved") / "mini")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"training\.json: not valid JSON"),
        ("[]", r"training\.json: not a JSON object"),
        ('{"curve": [{"perplexity": NaN}]}', r"training\.json: not valid JSON \(NaN is no number\)"),
        ('{"version": 2}', r"not an account that this release can read \(format fedbio-training, version 1\)"),
    ],
)
def test_a_damaged_account_is_refused(run: Path, content: str, message: str) -> None:
    (run / "training.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        read_encoder(run)


def test_nothing_is_written_of_an_account_that_no_card_can_be_made_of(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(account(read_encoder(run).sha256) | {"recipe": {"steps": [1, 2]}})
    (run / "training.json").write_text(text)
    assert main(["encoder", "convert", str(run), "-o", str(tmp_path / "out")]) == 2
    assert (
        "training.json: Expected `bool | int | float | str | null`, got `array` - at `$.recipe[...]`"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", encoder_names.packaged_encoders())
def test_each_encoder_in_this_installation_is_whole(name: str) -> None:
    folder = encoder_names.PACKAGED / name
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training.json", "vocab.txt",
    ]  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size <= MAX_BYTES
    loaded = read_encoder(name)
    assert (loaded.config.name, loaded.config.trained, loaded.path) == (name, True, folder)
    assert loaded.account is not None
    assert loaded.account.finished
    assert loaded.account.perplexity is not None
    card = (folder / "README.md").read_text()
    assert loaded.sha256 in card
    assert UNWRITTEN not in card
    text = (folder / "training.json").read_text()
    assert '"/' not in text, "a path of the machine that it was trained on"


def test_the_default_encoder_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDBIO_ENCODERS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name = encoder_names.DEFAULT_ENCODER
    loaded = read_encoder(name)
    assert (loaded.config.name, loaded.config.trained) == (name, True)
    assert loaded.path == encoder_names.PACKAGED / name
