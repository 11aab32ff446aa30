"""Tests of `fedbio embed` and `fedbio embeddings` as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbio.cli import main
from fedbio.encoder.bins import BINS, bins_name
from fedbio.encoder.memory import read_size
from fedbio.errors import SettingsError

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
    assert (made["proteins"], made["residues"], made["windowed"], made["encoder"]["name"]) == (2, 205, 1, "small")
    assert main(["embeddings", "show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "2 proteins (2 distinct sequences), 205 residues, 5 to 200 each" in shown
    assert "1 proteins longer than 128 residues were covered by windows" in shown
    assert main([*call, "--long", "cut"]) == 2
    assert "made with another encoder: long is 'window', not 'cut'" in capsys.readouterr().err
    assert main([*call, "--sha256", "0" * 64]) == 4


def test_dry_run_estimates_and_writes_nothing(
    small_encoder: Path, write_fasta: WriteFasta, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_fasta([100, 200, 50] * 50), tmp_path / "out.h5"
    call = ["embed", str(source), "-o", str(output), "--encoder", str(small_encoder), "--threads", "1", "--dry-run"]
    assert main([*call, "--json"]) == 0
    estimate = result(capsys)
    assert (estimate["proteins"], estimate["longer"], estimate["device"]) == (150, 50, "cpu")
    assert estimate["pieces"] == 200  # proteins of 200 residues in two windows of 128
    assert 0 < estimate["seconds"] < 60
    vectors = 32 * 4
    assert 150 * vectors < estimate["file_bytes"] < 150 * (vectors + 200) + 2**18
    # a row for each piece, a byte for each residue, a digest and an id for each protein
    assert estimate["disk_bytes"] - estimate["file_bytes"] == 200 * vectors + 50 * (100 + 200 + 50) + 150 * 60
    assert estimate["memory_bytes"] > 10**8
    assert main([*call, "--pooling", "ends", "--json"]) == 0
    wider = result(capsys)
    vectors_of_ends = vectors * (1 + BINS)
    assert wider["file_bytes"] - estimate["file_bytes"] == 150 * (vectors_of_ends - vectors)
    assert wider["disk_bytes"] - wider["file_bytes"] - 200 * vectors_of_ends == 50 * (100 + 200 + 50) + 150 * 60
    assert main([*call, "--pooling", "residues", "--long", "cut", "--json"]) == 0
    estimate = result(capsys)
    rows = 50 * (100 + 128 + 50)
    assert rows * vectors < estimate["file_bytes"] < rows * vectors + 2**18
    # the memory that it tells is what --memory is held against, of every process
    assert main([*call, "--memory", str(estimate["memory_bytes"] / 2**20) + "M"]) == 0
    capsys.readouterr()
    assert main([*call, "--device", "cpu,cpu", "--json"]) == 0
    assert result(capsys)["memory_bytes"] > 1.9 * estimate["memory_bytes"]
    assert main([*call, "--memory", "300M"]) == 2
    assert "small takes about" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["proteins.fasta"]


def test_pooling_and_layer_are_part_of_what_a_file_says(
    small_encoder: Path, write_fasta: WriteFasta, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_fasta([5, 9]), tmp_path / "out.h5"
    call = ["embed", str(source), "--encoder", str(small_encoder), "--threads", "1", "-o", str(output)]
    assert main([*call, "--pooling", "max", "--layer", "0", "--dtype", "float32", "--json"]) == 0
    encoder = result(capsys)["encoder"]
    assert (encoder["pooling"], encoder["layer"], encoder["dtype"]) == ("max", 0, "float32")
    assert main([*call, "--layer", "9"]) == 2
    assert "layer 9: small has layers 0 to 1" in capsys.readouterr().err
    assert main([*call, "--dtype", "float32"]) == 2
    assert "`--pooling max --layer 0` does as before" in capsys.readouterr().err
    output.unlink()
    assert main([*call, "--pooling", "ends"]) == 0
    assert main(["embeddings", "show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert f"2 rows of width {32 * (1 + BINS)}, one per protein" in shown
    assert f"  bins           {bins_name()}\n" in shown
    assert main(call) == 2
    assert "pooling is 'ends', not 'mean'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("2", 2**31), ("1.5G", 3 * 2**29), ("800M", 800 * 2**20), ("2GiB", 2**31), ("64 kb", 2**16)]
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert read_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "much", "2 GG"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"expected a size like 4, 1\.5G or 800M"):
        read_size(text)


def test_an_input_without_proteins_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.fasta").write_text("")
    assert main(["embed", str(tmp_path / "empty.fasta"), "-o", str(tmp_path / "out.h5")]) == 2
    assert "empty.fasta: the file is empty" in capsys.readouterr().err
