"""Tests that fair-esm's files give fair-esm's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedbio.encoder.checkpoint import load_encoder_weights, read_fair_esm
from fedbio.encoder.inference import Inference
from fedbio.encoder.packs import make_plan
from fedbio.errors import FormatError, SettingsError
from fedbio.weights import EncoderConfig, read_weights, weights_digest, write_weights

esm = pytest.importorskip("esm")

SEQUENCES = ["MKVLAAGIVGLCAKAYWTPQDENRHFSUOBZXMKTAYIAKQR", "ACDEFGHIKL", "LMNPQRSTVW", "M"]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter, norms and biases too, a value that matters."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.05)
    return model.eval()


def esm2(path: Path, *, token_dropout: bool = True) -> Any:
    model = randomize(
        esm.ESM2(num_layers=2, embed_dim=32, attention_heads=4, alphabet="ESM-1b", token_dropout=token_dropout)
    )
    options = argparse.Namespace(
        arch="esm2", encoder_layers=2, encoder_embed_dim=32, encoder_attention_heads=4, token_dropout=token_dropout
    )
    state = {
        ("encoder." if key.startswith("lm_head") else "encoder.sentence_encoder.") + key: value
        for key, value in model.state_dict().items()
        if not key.startswith("contact_head")
    }
    torch.save({"cfg": {"model": options}, "model": state}, path)
    return model


def esm1b(path: Path, *, norm_before: bool = True) -> Any:
    options = argparse.Namespace(
        arch="roberta_large",
        layers=2,
        embed_dim=32,
        ffn_embed_dim=96,
        attention_heads=4,
        max_positions=64,
        token_dropout=True,
        emb_layer_norm_before=norm_before,
    )
    model = randomize(esm.ProteinBertModel(options, esm.Alphabet.from_architecture("ESM-1b")))
    renamed = {("arch" if key == "arch" else f"encoder_{key}"): value for key, value in vars(options).items()}
    state = {
        "encoder." + ("" if key.startswith("lm_head") else "sentence_encoder.") + key: value
        for key, value in model.state_dict().items()
        if not key.startswith("contact_head")
    }
    torch.save({"args": argparse.Namespace(**renamed), "model": state}, path)
    return model


def their_means(model: Any) -> np.ndarray:
    """fair-esm's own forward on a padded batch, averaged over residues as its extract script does."""
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    _, _, tokens = convert([(str(number), sequence) for number, sequence in enumerate(SEQUENCES)])
    with torch.no_grad():
        hidden = model(tokens, repr_layers=[2])["representations"][2]
    return np.stack([row[1 : 1 + len(s)].mean(0).numpy() for row, s in zip(hidden, SEQUENCES, strict=True)])


def our_means(path: Path) -> np.ndarray:
    config, weights = load_encoder_weights(path)
    inference = Inference(config, weights, device=torch.device("cpu"), dtype=torch.float32, threads=1)
    sequences = [sequence.encode() for sequence in SEQUENCES]
    plan = make_plan([len(s) for s in sequences], max_residues=config.max_residues, windows=False, budget=4096)
    means = np.empty((len(sequences), config.width), np.float32)
    means[plan.protein] = inference.pack(sequences, plan, 0) / (plan.end - plan.begin)[:, None]
    return means


@pytest.mark.parametrize("token_dropout", [True, False])
def test_esm2_equals_fair_esm(tmp_path: Path, token_dropout: bool) -> None:
    theirs = their_means(esm2(tmp_path / "any name.pt", token_dropout=token_dropout))
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(our_means(tmp_path / "any name.pt"), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_before", [True, False])
def test_esm1b_equals_fair_esm(tmp_path: Path, norm_before: bool) -> None:
    theirs = their_means(esm1b(tmp_path / "esm2 by name only.pt", norm_before=norm_before))
    np.testing.assert_allclose(our_means(tmp_path / "esm2 by name only.pt"), theirs, rtol=0, atol=1e-5)


def test_configuration_comes_from_the_content_of_the_file(tmp_path: Path) -> None:
    esm2(tmp_path / "a.pt")
    esm1b(tmp_path / "b.pt")
    two, one = read_fair_esm(tmp_path / "a.pt")[0], read_fair_esm(tmp_path / "b.pt")[0]
    assert (two.name, two.positions, two.token_scale, two.max_residues, two.embedding_norm) == (
        "a", "rotary", 0.88, 1022, False,
    )  # fmt: skip
    assert (one.name, one.positions, one.max_tokens, one.max_residues, one.embedding_norm) == (
        "b", "learned", 64, 62, True,
    )  # fmt: skip


def test_a_converted_folder_keeps_numbers_and_digest(tmp_path: Path) -> None:
    esm2(tmp_path / "a.pt")
    config, weights = read_fair_esm(tmp_path / "a.pt")
    write_weights(tmp_path / "folder", config, weights)
    again, copied = read_weights(tmp_path / "folder")
    assert again == config
    assert weights_digest(copied) == weights_digest(weights)
    np.testing.assert_array_equal(our_means(tmp_path / "folder"), our_means(tmp_path / "a.pt"))


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": {}, "args": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(FormatError, match=r"trap\.pt: not a checkpoint that can be loaded safely"):
        read_fair_esm(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "not a fair-esm checkpoint: it has no 'model' entry"),
        ({"model": {}, "args": argparse.Namespace(arch="msa_transformer")}, "of architecture 'msa_transformer'"),
        ({"model": {}}, "of architecture None; ESM-2, ESM-1b and ESM-1v are read"),
        ({"model": {}, "cfg": {}}, "the checkpoint lacks 'model'"),
        ({"model": {}, "cfg": {"model": argparse.Namespace()}}, "the checkpoint lacks 'embed_dim'"),
    ],
)
def test_other_torch_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=message):
        read_fair_esm(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"no torch file at all", b"PK\x03\x04broken"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.pt: not a checkpoint that can be loaded safely"):
        read_fair_esm(tmp_path / "x.pt")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    esm2(tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "a.pt", weights_only=True)
    del content["model"]["encoder.sentence_encoder.layers.1.fc2.bias"]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt: tensor 'layers\.1\.fc2\.bias' is missing"):
        read_fair_esm(tmp_path / "a.pt")


def test_an_unknown_encoder_is_named() -> None:
    with pytest.raises(SettingsError, match="encoder 'esm9': neither a built-in name"):
        load_encoder_weights("esm9")


def test_a_built_in_name_needs_no_file() -> None:
    config, _ = load_encoder_weights("esm1nv-44m", seed=1)
    assert config == EncoderConfig(trained=False)
