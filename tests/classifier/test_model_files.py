from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedbio.classifier import Model, ModelCard, Standardizer, initialize, load_model, save_model
from fedbio.errors import DataError, FormatError
from fedbio.results import EncoderInfo


@pytest.fixture
def saved(tmp_path: Path, info: EncoderInfo, classes: tuple[str, ...]) -> Path:
    card = ModelCard(
        classes=list(classes), hidden=[8, 4], encoder=info, unsure_below=0.6, metrics={"validation_accuracy": 0.75}
    )
    standardizer = Standardizer(np.arange(16, dtype=np.float32), np.full(16, 2, dtype=np.float32))
    save_model(tmp_path / "model", initialize(16, (8, 4), 3, seed=0), standardizer, card)
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was_saved(saved: Path, info: EncoderInfo) -> None:
    model = load_model(saved)
    expected = initialize(16, (8, 4), 3, seed=0)
    assert model.parameters.keys() == expected.keys()
    assert all(np.array_equal(model.parameters[name], expected[name]) for name in expected)
    assert model.standardizer.mean.tolist() == list(range(16))
    assert model.standardizer.scale.tolist() == [2.0] * 16
    assert (model.card.mlp, model.card.encoder, model.card.unsure_below) == ("8-4", info, 0.6)
    assert {path.name for path in saved.iterdir()} == {"model.json", "model.safetensors"}


def test_a_model_standardizes_before_it_predicts(saved: Path) -> None:
    model = load_model(saved)
    embeddings = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    plain = Model(model.parameters, Standardizer.fit(np.eye(16, dtype=np.float32)), model.card)
    assert model.predict(embeddings).shape == (5, 3)
    assert not np.allclose(model.predict(embeddings), plain.predict(embeddings))
    flags = model.is_unsure(np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]], dtype=np.float32))
    assert flags.tolist() == [True, False]


def test_the_card_says_how_to_use_the_model(saved: Path) -> None:
    card = json.loads((saved / "model.json").read_text())
    assert card["format"] == "fedbio-classifier"
    assert card["version"] == 1
    assert card["classes"] == ["Cytoplasm", "Extracellular", "Nucleus"]
    assert card["hidden"] == [8, 4]
    assert card["encoder"]["weights_sha256"] == "a" * 64
    assert card["unsure_below"] == 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "fedbio-classifier version 2; this release reads version 1, update fedbio"),
        ({"format": "onnx"}, "not a model card that this release can read"),
        ({"classes": 3}, r"Expected `array`, got `int` - at `\$.classes`"),
        ({"hidden": [8, 5]}, "does not fit model.json: an MLP of widths 16-8-4-3 instead of 16-8-5-3"),
        ({"parameters_sha256": "0" * 64}, "the file is damaged or of another model"),
    ],
)
def test_a_card_that_is_wrong_is_refused(saved: Path, change: dict[str, object], message: str) -> None:
    card = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(card | change))
    with pytest.raises(FormatError, match=message):
        load_model(saved)


def test_text_that_is_not_json_is_refused(saved: Path) -> None:
    (saved / "model.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(FormatError, match=r"model\.json: not a model card"):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: not found; a model folder holds"):
        load_model(saved)


def test_a_damaged_parameter_file_is_found(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors: its SHA-256 is not the one in model\.json"):
        load_model(saved)


def test_parameters_that_do_not_fit_the_card_are_not_saved(tmp_path: Path, info: EncoderInfo) -> None:
    card = ModelCard(classes=["a", "b"], hidden=[8], encoder=info)
    with pytest.raises(DataError, match="widths 16-4-2 instead of 16-8-2"):
        save_model(tmp_path, initialize(16, (4,), 2, seed=0), Standardizer(np.zeros(16), np.ones(16)), card)
    assert not list(tmp_path.iterdir())
