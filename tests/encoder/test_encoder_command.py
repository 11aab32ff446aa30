"""``fedbio encoder`` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.cli import main
from fedbio.encoder.checkpoint import read_encoder
from fedbio.weights import EncoderConfig, head_shapes, inference_shapes, read_weights, write_weights

ESM2 = EncoderConfig(
    name="mine", layers=2, heads=4, width=32, ffn=128, vocabulary=33, max_tokens=64, alphabet="esm",
    positions="rotary", activation="gelu", token_scale=0.88,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    shapes = inference_shapes(ESM2) | head_shapes(ESM2)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_weights(tmp_path / "cache" / "lab" / "mine", ESM2, weights)
    return tmp_path / "cache" / "lab" / "mine"


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["encoder", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_show_states_the_published_size_of_esm1nv(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "show", "esm1nv-44m")
    assert (found["parameters"], found["parameters_with_head"], found["trained"]) == (43_020_288, 43_612_544, False)
    assert found["weights_sha256"] == "7d5c47c85cb29e11ea80f2026b100cfaf5f19f40c12fc19be785ceda7311f6cd"


def test_show_finds_a_name_in_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoder", "show", "lab/mine", "--cache", str(folder.parents[1])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"mine: trained, folder of fedbio ({folder})\n2 layers, 4 heads, width 32, feed-forward 128"
    )
    found = as_json(capsys, "show", folder)
    assert found["architecture"]["positions"] == "rotary"
    assert (found["form"], found["head"], found["max_residues"], found["path"]) == ("fedbio", True, 62, str(folder))


def test_convert_there_and_back_keeps_every_number(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = as_json(capsys, "convert", folder, "-o", tmp_path / "hf", "--to", "huggingface")
    back = as_json(capsys, "convert", tmp_path / "hf", "-o", tmp_path / "back", "--name", "again")
    assert there["weights_sha256"] == back["weights_sha256"]
    assert there["head"] is back["head"] is True
    # colleagues who share a cache may read all of it, or nothing
    assert len({path.stat().st_mode for name in ("hf", "back") for path in (tmp_path / name).iterdir()}) == 1
    config, weights = read_weights(tmp_path / "back")
    assert config.name == "again"
    for name, tensor in read_weights(folder)[1].items():
        np.testing.assert_array_equal(weights[name], tensor)


def test_convert_overwrites_an_encoder_of_the_same_form_and_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["encoder", "convert", str(folder), "-o", str(output)]) == 0
    assert main(["encoder", "convert", str(folder), "-o", str(output)]) == 0
    assert main(["encoder", "convert", str(folder), "-o", str(output), "--to", "huggingface"]) == 2
    assert f"{output}: there is something else already; give a new folder" in capsys.readouterr().err
    assert read_encoder(output).form == "fedbio"
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("x")
    assert main(["encoder", "convert", str(folder), "-o", str(tmp_path / "papers")]) == 2
    assert [path.name for path in (tmp_path / "papers").iterdir()] == ["thesis.txt"]


def test_what_is_no_encoder_is_refused_with_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 600)
    assert main(["encoder", "show", str(tmp_path / "model.safetensors")]) == 2
    assert "of safetensors give the folder, with its config.json" in capsys.readouterr().err
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "model_config.yaml").touch()
    assert main(["encoder", "show", str(tmp_path / "unpacked")]) == 2
    assert "an unpacked .nemo archive; give the archive, or pack it again: tar -cf" in capsys.readouterr().err
