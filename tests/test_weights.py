"""Tests of encoder folders: written, read, digested, and refused where they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedbio.errors import DataError, FormatError
from fedbio.files import sha256_file
from fedbio.vocabularies import VOCABULARIES
from fedbio.weights import (
    EncoderConfig,
    Weights,
    head_shapes,
    inference_shapes,
    read_config,
    read_weights,
    weights_digest,
    write_weights,
)

CONFIG = EncoderConfig(name="one", layers=1, heads=2, width=8, ffn=16, vocabulary=30, max_tokens=10)


@pytest.fixture
def weights() -> Weights:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in inference_shapes(CONFIG).items()}


@pytest.fixture
def folder(tmp_path: Path, weights: Weights) -> Path:
    write_weights(tmp_path / "encoder", CONFIG, weights)
    return tmp_path / "encoder"


def test_what_was_written_is_read(folder: Path, weights: Weights) -> None:
    config, again = read_weights(folder)
    assert config == CONFIG
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_the_digest_is_that_of_the_weights_file(folder: Path, weights: Weights) -> None:
    assert weights_digest(weights) == sha256_file(folder / "model.safetensors")


def test_the_digest_does_not_depend_on_order_or_on_a_language_model_head(weights: Weights) -> None:
    turned = dict(reversed(weights.items())) | {"lm_head.bias": np.zeros(30, np.float32)}
    assert weights_digest(turned) == weights_digest(weights)


def test_a_folder_says_what_its_rows_stand_for(folder: Path, weights: Weights) -> None:
    lines = (folder / "vocab.txt").read_text().splitlines()
    assert lines[:7] == ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "L", "A"]
    assert len(lines) == 30
    (folder / "vocab.txt").unlink()  # a folder of an older release
    assert read_weights(folder)[0] == CONFIG
    (folder / "vocab.txt").write_text(VOCABULARIES["esm"].text)
    with pytest.raises(FormatError, match=r"vocab\.txt: the tokens of 'esm', but config\.json says 'esm1nv'"):
        read_weights(folder)


def test_a_language_model_head_is_whole_or_not_there(tmp_path: Path, weights: Weights) -> None:
    head = {name: np.ones(shape, np.float32) for name, shape in head_shapes(CONFIG).items()}
    write_weights(tmp_path / "a", CONFIG, weights | head)
    assert read_weights(tmp_path / "a")[1].keys() == weights.keys() | head.keys()
    del head["lm_head.norm.bias"]
    with pytest.raises(DataError, match=r"tensor 'lm_head\.norm\.bias' is missing; one needs it with shape \[8\]"):
        write_weights(tmp_path / "b", CONFIG, weights | head)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", 10**12, r"<= 1024"),
        ("width", 10**9, r"<= 65536"),
        ("vocabulary", 29, "a token table of 29 rows is too small for the alphabet 'esm1nv'"),
    ],
)
def test_a_hostile_size_is_refused_before_anything_is_made_of_it(
    folder: Path, key: str, value: int, message: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(FormatError, match=message):
        read_weights(folder)


def test_the_digest_changes_with_one_bit(weights: Weights) -> None:
    before = weights_digest(weights)
    weights["final_norm.bias"].view(np.uint32)[0] ^= 1
    assert weights_digest(weights) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, r"Expected `int` >= 1 - at `\$\.layers`"),
        ({"heads": 3}, r"width 8 is not a multiple of twice the number of heads, 3"),
        ({"alphabet": "dna"}, r"Invalid enum value 'dna' - at `\$\.alphabet`"),
        ({"version": 2}, r"Invalid enum value 2 - at `\$\.version`"),
        ({"widht": 8}, r"unknown field `widht`"),
    ],
)
def test_a_wrong_configuration_is_refused_by_key(folder: Path, change: dict[str, object], message: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(
        FormatError, match=rf"config\.json: not a configuration that this release can read: .*{message}"
    ):
        read_config(folder)


def test_weights_of_another_shape_are_refused(folder: Path, weights: Weights) -> None:
    weights["layers.0.up.weight"] = weights["layers.0.up.weight"].T.copy()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"tensor 'layers\.0\.up\.weight': expected float32 of shape \[16, 8\], found .* \[8, 16\]"
    ):
        read_weights(folder)


def test_a_missing_tensor_is_named(folder: Path, weights: Weights) -> None:
    del weights["final_norm.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"tensor 'final_norm\.bias' is missing; one needs it with shape \[8\]"):
        read_weights(folder)


def test_an_unknown_tensor_is_named(weights: Weights, tmp_path: Path) -> None:
    weights["pooler.weight"] = np.zeros(3, np.float32)
    with pytest.raises(DataError, match=r"tensor 'pooler\.weight' is not part of one"):
        write_weights(tmp_path / "encoder", CONFIG, weights)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_damaged_weights_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors: not a readable safetensors file"):
        read_weights(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FormatError, match=rf"{name}: not found; an encoder folder holds"):
        read_weights(folder)


def test_a_servers_imports_stay_light() -> None:
    code = "import sys, fedbio.weights; sys.exit(any(name in sys.modules for name in ('torch', 'h5py', 'pandas')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
