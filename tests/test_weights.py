"""Tests of encoder folders: written, read, digested, and refused where they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
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
from fedbio.weights_file import WeightForm, file_weight_form

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
        FormatError,
        match=r"tensor 'layers\.0\.up\.weight': expected float32 or float16 of shape \[16, 8\], found .* \[8, 16\]",
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
    with pytest.raises(FormatError, match=r"model\.safetensors: not a sound safetensors file"):
        read_weights(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FormatError, match=rf"{name}: not found; an encoder folder holds"):
        read_weights(folder)


def test_a_servers_imports_stay_light() -> None:
    code = "import sys, fedbio.weights; sys.exit(any(name in sys.modules for name in ('torch', 'h5py', 'pandas')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


HEAD = {name: np.full(shape, 0.3, np.float32) for name, shape in head_shapes(CONFIG).items()}
LARGER = EncoderConfig(name="larger", layers=1, heads=2, width=32, ffn=64, max_tokens=66)


@pytest.fixture
def larger() -> Weights:
    random = np.random.default_rng(1)
    shapes = inference_shapes(LARGER) | head_shapes(LARGER)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_float16_rounds_matrices_and_keeps_norms_and_biases(tmp_path: Path, weights: Weights) -> None:
    write_weights(tmp_path, CONFIG, weights | HEAD, "float16")
    again = read_weights(tmp_path)[1]
    for name, tensor in (weights | HEAD).items():
        kept = tensor if tensor.ndim == 1 else tensor.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(again[name], kept)
        assert again[name].dtype == np.float32
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        dtypes = {name: str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert dtypes["layers.0.up.weight"] == dtypes["lm_head.dense.weight"] == "float16"
    assert dtypes["layers.0.up.bias"] == dtypes["final_norm.weight"] == "float32"


def test_int8_keeps_linear_maps_as_bytes_and_tables_as_float16(tmp_path: Path, larger: Weights) -> None:
    write_weights(tmp_path / "bytes", LARGER, larger, "int8")
    write_weights(tmp_path / "plain", LARGER, larger)
    again = read_weights(tmp_path / "bytes")[1]
    for name, tensor in larger.items():
        error = np.abs(again[name] - tensor).max()
        if tensor.ndim == 1:
            assert error == 0
        elif name in ("tokens.weight", "positions.weight"):
            np.testing.assert_array_equal(again[name], tensor.astype(np.float16).astype(np.float32))
        else:
            # even steps of 1/127 of a block's largest, some 3.5 standard deviations, are off by 0.8 % of one
            assert 0 < np.sqrt(np.square(again[name] - tensor).mean()) < 0.01
    stored = {kind: (tmp_path / kind / "model.safetensors").stat().st_size for kind in ("bytes", "plain")}
    assert stored["bytes"] < 0.42 * stored["plain"]
    assert [file_weight_form(tmp_path / kind / "model.safetensors") for kind in ("bytes", "plain")] == [
        "int8", "float32",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_the_digest_is_of_the_values_whatever_file_holds_them(
    tmp_path: Path, larger: Weights, form: WeightForm
) -> None:
    write_weights(tmp_path / "narrow", LARGER, larger, form)
    rounded = read_weights(tmp_path / "narrow")[1]
    write_weights(tmp_path / "wide", LARGER, rounded)
    digest = weights_digest(read_weights(tmp_path / "wide")[1])
    assert digest == weights_digest(rounded) != weights_digest(larger)
    # what is rounded once stays as it is
    write_weights(tmp_path / "again", LARGER, rounded, "float16" if form == "float16" else "float32")
    assert weights_digest(read_weights(tmp_path / "again")[1]) == digest


def test_a_value_too_large_for_float16_is_refused_and_nothing_is_written(tmp_path: Path, weights: Weights) -> None:
    weights["layers.0.up.weight"][0, 0] = -70_000
    with pytest.raises(DataError, match=r"'layers\.0\.up\.weight': the value 70000 is too large for float16"):
        write_weights(tmp_path, CONFIG, weights, "float16")
    assert not (tmp_path / "model.safetensors").exists()


def _header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def _with_header(path: Path, header: dict[str, Any]) -> None:
    raw = path.read_bytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :])


def _says_more(header: dict[str, Any]) -> None:
    header["layers.0.up.weight"]["shape"] = [1 << 40, 1 << 20]


def _claims_a_giant(header: dict[str, Any]) -> None:
    entry = json.loads(header["__metadata__"]["fedbio.quantized"])
    entry["layers.0.up.weight"]["shape"] = [1 << 30, 1 << 10]
    header["__metadata__"]["fedbio.quantized"] = json.dumps(entry)


def _names_another_scheme(header: dict[str, Any]) -> None:
    text = header["__metadata__"]["fedbio.quantized"]
    header["__metadata__"]["fedbio.quantized"] = text.replace("int8", "nf4")


def _forgets_what_is_quantized(header: dict[str, Any]) -> None:
    del header["__metadata__"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_says_more, r"tensor 'layers\.0\.up\.weight': shape .* of U8 takes"),
        (_claims_a_giant, r"tensor 'layers\.0\.up\.weight': int8 of shape \[1073741824, 1024\] is stored as U8"),
        (_names_another_scheme, r"quantized as 'nf4'; accepted here: int8"),
        (_forgets_what_is_quantized, r"expected float32 or float16 of shape \[32, 64\], found uint8 of shape"),
    ],
)
def test_a_hostile_header_is_refused_by_what_it_claims(
    tmp_path: Path, larger: Weights, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    write_weights(tmp_path, LARGER, larger, "int8")
    path = tmp_path / "model.safetensors"
    header = _header(path)
    change(header)
    _with_header(path, header)
    with pytest.raises(FormatError, match=message):
        read_weights(tmp_path)


def test_values_that_are_not_finite_and_files_cut_short_are_refused(tmp_path: Path, weights: Weights) -> None:
    write_weights(tmp_path, CONFIG, weights, "float16")
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"model\.safetensors: not a sound .* its tensors take \d+ bytes, \d+ follow"):
        read_weights(tmp_path)
    path.write_bytes(whole[:-2] + b"\x00\x7c")
    with pytest.raises(FormatError, match=r"tensor '.*': a value is not finite; get a fresh copy"):
        read_weights(tmp_path)
