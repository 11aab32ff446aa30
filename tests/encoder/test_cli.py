"""Tests of `fedbio embed` and `fedbio embeddings` as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbio.cli import main

from .conftest import WriteFasta


def result(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_embed_and_show(
    small_encoder: Path, write_fasta: WriteFasta, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_fasta([5, 200]), tmp_path / "out.h5"
    call = ["embed", str(source), "-o", str(output), "--encoder", str(small_encoder), "--threads", "1"]
    assert main([*call, "--json"]) == 0
    made = result(capsys)
    assert (made["proteins"], made["residues"], made["cut"], made["encoder"]["name"]) == (2, 205, 1, "small")
    assert main(["embeddings", "show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "2 proteins (2 distinct sequences), 205 residues, 5 to 200 each" in shown
    assert "1 proteins longer than 128 residues were cut" in shown
    assert main([*call, "--long", "window"]) == 2
    assert "made with another encoder: long is 'cut', not 'window'" in capsys.readouterr().err
    assert main([*call, "--sha256", "0" * 64]) == 4


def test_dry_run_estimates_and_writes_nothing(
    small_encoder: Path, write_fasta: WriteFasta, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_fasta([100, 200, 50] * 50), tmp_path / "out.h5"
    call = ["embed", str(source), "-o", str(output), "--encoder", str(small_encoder), "--threads", "1", "--dry-run"]
    assert main([*call, "--json"]) == 0
    estimate = result(capsys)
    assert (estimate["proteins"], estimate["longer"], estimate["device"]) == (150, 50, "cpu")
    assert 0 < estimate["seconds"] < 60
    assert estimate["disk_bytes"] == 2 * 150 * 32 * 4
    assert estimate["memory_bytes"] > 10**8
    assert [path.name for path in tmp_path.iterdir()] == ["proteins.fasta"]


def test_an_input_without_proteins_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.fasta").write_text("")
    assert main(["embed", str(tmp_path / "empty.fasta"), "-o", str(tmp_path / "out.h5")]) == 2
    assert "empty.fasta: the file is empty" in capsys.readouterr().err
