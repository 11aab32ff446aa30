"""What the repository says of the encoder that comes with it is said of the weights that come with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbio.encoder_names import DEFAULT_ENCODER

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "fedbio" / "encoders" / DEFAULT_ENCODER


@pytest.fixture(scope="module")
def account() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())
    return found


@pytest.mark.parametrize("name", ["scl_probe", "scl_probe_validation", "scl_probe_attention"])
def test_figures_were_measured_with_these_weights(name: str, account: dict[str, Any]) -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    trained = [each for each in measured["embeddings"].values() if each["trained"]]
    assert trained
    assert {each["weights_sha256"] for each in trained} == {account["weights_sha256"]}


def test_manuals_tell_its_tokens_and_its_perplexity(account: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text()
    for text in (card, (ROOT / "README.md").read_text()):
        assert f"{account['tokens'] / 1e6:.1f} million" in text
        assert f"{account['curve'][-1]['perplexity']:.2f}" in text
    assert account["weights_sha256"] in card


def test_card_tells_the_accuracies_that_were_measured() -> None:
    card = (FOLDER / "README.md").read_text()
    measured = json.loads((ROOT / "benchmarks" / "results" / "scl_probe.json").read_text())
    told = [
        each for each in measured["results"] if each.get("features") == "ends" and each["name"].endswith(": accuracy")
    ]
    assert len(told) == 6
    for each in told:
        assert f"{100 * each['value']:.1f}" in card, each["name"]
