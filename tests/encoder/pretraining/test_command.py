"""Tests of `fedbio pretrain` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest

from fedbio.cli import main
from fedbio.encoder.pretraining import checkpoints
from fedbio.weights import read_weights, weights_digest

from .conftest import Command, write_proteins


def result(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_proteins_become_an_encoder_that_embed_reads(
    command: Command, proteins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(), "--json"]) == 0
    made = result(capsys)
    assert (made["finished"], made["step"], made["steps"]) == (True, 12, 12)
    config, weights = read_weights(tmp_path / "out")
    assert config.trained
    assert config.name == "esm1nv-mini"
    assert weights_digest(weights) == made["weights_sha256"]
    assert "lm_head.dense.weight" in weights
    account = json.loads((tmp_path / "out" / "training.json").read_text())
    assert account["weights_sha256"] == made["weights_sha256"]
    assert account["tokens"] == made["tokens"] > 12 * 256
    assert account["recipe"]["steps"] == 12
    assert [point["step"] for point in account["curve"]] == [0, 4, 8, 12]
    assert account["curve"][0]["perplexity"] == pytest.approx(128, rel=0.05)
    assert account["curve"][3]["perplexity"] < 0.9 * account["curve"][0]["perplexity"]
    assert account["curve"][3]["residues"] == account["corpus"]["residues"]["valid"]
    assert account["corpus"]["sources"][0]["name"] == "proteins.fasta"
    assert account["software"].keys() == {"fedbio", "torch", "numpy", "python"}
    assert str(tmp_path) not in json.dumps(account)
    assert main(["embed", str(proteins), "-o", str(tmp_path / "p.h5"), "--encoder", str(tmp_path / "out")]) == 0
    with h5py.File(tmp_path / "p.h5") as file:
        assert file["embeddings"].shape == (40, 32)


@pytest.mark.slow
def test_stretches_end_in_the_same_bytes_as_one_go(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command("--json")]) == 0
    whole = result(capsys)
    for _ in range(12):  # each stretch is over after one update
        assert main([*command("--minutes", "1e-9", "--json", output="parts")]) == 0
        stretch = result(capsys)
        if stretch["finished"]:
            break
    assert (stretch["step"], stretch["tokens"]) == (12, whole["tokens"])
    assert stretch["weights_sha256"] == whole["weights_sha256"]
    accounts = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("out", "parts")]
    assert accounts[0]["curve"] == accounts[1]["curve"]
    assert [each["step"] for each in accounts[1]["stretches"]] == list(range(12))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "perplexity" in line] == [0, 4, 8]


@pytest.mark.slow
def test_a_schedule_may_be_made_longer_until_the_rate_begins_to_fall(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    level = ["--json", "--decay-share", "0.5", "--warmup-steps", "1", "--average", "none"]
    assert main([*command(*level, "--steps", "10")]) == 0
    whole = result(capsys)
    for _ in range(3):  # each stretch is over after one update
        assert main([*command(*level, "--steps", "6", "--minutes", "1e-9", output="parts")]) == 0
    capsys.readouterr()
    assert main([*command(*level, "--steps", "10", output="parts")]) == 0
    assert result(capsys)["weights_sha256"] == whole["weights_sha256"]
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["recipe"]["steps"] == 10
    # the rate has fallen: it is too late
    assert main([*command(*level, "--steps", "20", output="parts")]) == 2
    assert "steps was 10 and is 20" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command("--json")]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*command("--json")]) == 0
    assert result(capsys)["finished"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--learning-rate", "0.5"], "learning_rate was 0.002 and is 0.5"),
        (["--steps", "13"], "steps was 12 and is 13"),
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--packs", "3"], "packs was 2 and is 3"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
        (["--width", "64"], "width was 32 and is 64"),
        (["--average", "ema"], "average was 'tail' and is 'ema'"),
        (["--valid-fraction", "0.3"], "valid_fraction was 0.2 and is 0.3"),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(
    command: Command, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    assert main(command("--warmup-steps", "0", "--decay-share", "1", "--minutes", "1e-9")) == 0
    capsys.readouterr()
    assert main(command("--warmup-steps", "0", "--decay-share", "1", *option)) == 2
    assert message in capsys.readouterr().err


def test_how_a_run_is_carried_out_may_change(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--minutes", "1e-9")) == 0
    capsys.readouterr()
    assert main([*command("--save-minutes", "1", "--log-every", "3", "--json")]) == 0
    assert result(capsys)["finished"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*command("--json")]) == 0
    whole = result(capsys)["weights_sha256"]
    for _ in range(3):
        assert main(command("--minutes", "1e-9", output="parts")) == 0
    files = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    assert [file.name for file in files] == ["step-000000002.safetensors", "step-000000003.safetensors"]
    content = bytearray(files[1].read_bytes())
    content[-5] ^= 1
    files[1].write_bytes(content)
    capsys.readouterr()
    assert main([*command("--json", output="parts")]) == 0
    assert result(capsys)["weights_sha256"] == whole
    assert "step-000000003.safetensors: damaged" in caplog.text


def test_only_damaged_checkpoints_are_no_reason_to_begin_again(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--minutes", "1e-9")) == 0
    (file,) = (tmp_path / "out" / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert main(command()) == 2
    assert "no checkpoint is left to go on from" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command("--minutes", "1e-9")) == 0

    def full(*ignored: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full)
        assert main(command()) == 2
    assert "the disk is full" in capsys.readouterr().err
    names = [file.name for file in (tmp_path / "out" / "checkpoints").iterdir()]
    assert names == ["step-000000001.safetensors"]
    assert main([*command("--json")]) == 0
    assert result(capsys)["finished"]


def test_another_encoder_is_gone_on_from(
    command: Command, proteins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    call = ["pretrain", str(proteins), "-o", str(tmp_path / "next"), "--from", str(tmp_path / "out"), "--name", "next"]
    call += ["--no-tensorboard", "--valid-fraction", "0.2", "--steps", "2", "--pack-tokens", "256", "--threads", "1"]
    capsys.readouterr()
    assert main([*call, "--dtype", "float32"]) == 0
    accounts = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("out", "next")]
    assert (accounts[1]["encoder"], accounts[1]["from"]) == ("next", "out")
    # the same held-out proteins and masks: it begins where the other ended
    assert accounts[1]["curve"][0]["perplexity"] == pytest.approx(accounts[0]["curve"][-1]["perplexity"], rel=1e-6)
    assert main([*call, "--width", "64"]) == 2
    assert "--width: the encoder of --from has its own" in capsys.readouterr().err


def test_tokens_set_the_length(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = command("--json")
    at = call.index("--steps")
    call[at : at + 2] = ["--tokens", "3e3"]
    assert main(call) == 0
    made = result(capsys)
    assert made["finished"]
    assert 0.9 * 3_000 <= made["tokens"] <= 3_000 + 2 * 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "esm3"], "--preset 'esm3': expected one of esm1nv-44m, esm1nv-mini"),
        (["--tokens", "1e6"], "--steps and --tokens both say how long"),
        (["--minutes", "0"], "--minutes 0.0: expected a number above 0"),
        (["--heads", "5"], "not a multiple of twice the number of heads"),
        (["--average", "median"], "Invalid enum value 'median' - at `$.average`"),
        (["--exclude", "nowhere.fasta"], "nowhere.fasta: no such file"),
        (["--seed", "-1"], "Expected `int` >= 0 - at `$.seed`"),
    ],
)
def test_wrong_options_are_refused(
    command: Command, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(*options)) == 2
    assert message in capsys.readouterr().err


def test_what_is_excluded_is_counted_in_the_account(command: Command, tmp_path: Path) -> None:
    banned = write_proteins(tmp_path / "test.fasta", [20 + 3 * number for number in range(5)])
    # the generator draws letter by letter: the first proteins of the same seed are the same
    assert main(command("--exclude", str(banned), "--steps", "1")) == 0
    corpus = json.loads((tmp_path / "out" / "training.json").read_text())["corpus"]
    assert corpus["excluded"] == 5
    assert corpus["proteins"]["train"] + corpus["proteins"]["valid"] == 35
    assert corpus["excluded_sources"][0]["name"] == "test.fasta"


def test_tensorboard_gets_what_the_lines_say(command: Command, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    call = command("--log-every", "4")
    call.remove("--no-tensorboard")
    assert main(call) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == [4, 8, 12]
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "jobs.md"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("not ours")
    assert main(command()) == 2
    message = capsys.readouterr().err
    assert f"the folder holds {name}, and is not one that fedbio pretrain goes on with" in message
    assert "name a new or an empty folder" in message
    assert [(each.name, each.read_text()) for each in (tmp_path / "out").iterdir()] == [(name, "not ours")]


def test_a_file_is_no_output_folder(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("not ours")
    assert main(command()) == 2
    assert "out: is a file; name a folder for the encoder" in capsys.readouterr().err


def test_what_a_run_that_was_killed_while_packing_leaves_is_gone_on_with(command: Command, tmp_path: Path) -> None:
    (tmp_path / "out" / ".corpus.part").mkdir(parents=True)
    (tmp_path / "out" / ".lock").touch()
    assert main(command("--minutes", "1e-9")) == 0


def test_the_encoder_that_is_started_from_is_not_replaced(
    command: Command, proteins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--minutes", "1e-9")) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for output in ("out", "link"):
        call = ["pretrain", str(proteins), "-o", str(tmp_path / output), "--from", str(tmp_path / "out")]
        assert main(call) == 2
        assert f"{output}: this is the encoder of --from, which would be replaced" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_the_summary_says_at_which_update_the_perplexity_was_measured(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--minutes", "1e-9")) == 0
    assert "1 of 12 updates" in (said := capsys.readouterr().out)
    assert "(at update 0); the same command goes on" in said
    assert main([*command("--minutes", "1e-9", "--json")]) == 0
    assert result(capsys)["perplexity_step"] == 0
    assert main(command()) == 0
    said = capsys.readouterr().out
    assert ", final perplexity " in said
    assert "at update" not in said
    assert main([*command("--json")]) == 0
    assert result(capsys)["perplexity_step"] == 12


def test_other_proteins_are_refused_by_the_names_of_their_files(
    command: Command, proteins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--minutes", "1e-9")) == 0
    other = write_proteins(tmp_path / "other.fasta", [30] * 20, seed=1)
    call = command()
    call[1] = str(other)
    assert main(call) == 2
    message = capsys.readouterr().err
    assert "sources was proteins.fasta and is other.fasta; give the same files and options to go on" in message
    proteins.write_bytes(other.read_bytes())
    assert main(command()) == 2
    assert "the content of proteins.fasta is another" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["150M", "inf"])
def test_tokens_that_are_no_number_are_refused_with_an_example(
    command: Command, capsys: pytest.CaptureFixture[str], tokens: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command("--tokens", tokens))
    assert caught.value.code == 2
    assert f"argument --tokens: expected a number such as 150e6, found '{tokens}'" in capsys.readouterr().err
