"""Tests that fair-esm's files give fair-esm's numbers."""

from __future__ import annotations

import argparse
import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedbio.encoder.checkpoint import load_encoder_weights, read_fair_esm
from fedbio.errors import FormatError
from fedbio.weights import EncoderConfig

from .parity import SEQUENCES, assert_close, hidden_and_logits, randomize

esm = pytest.importorskip("esm")


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


def assert_parity(model: Any, path: Path) -> None:
    """Compare hidden states and logits, fair-esm's computed on one padded batch."""
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    _, _, tokens = convert([(str(number), sequence) for number, sequence in enumerate(SEQUENCES)])
    with torch.no_grad():
        theirs = model(tokens, repr_layers=[2])
    ours = [hidden_and_logits(*load_encoder_weights(path), on_cpu=on_cpu) for on_cpu in (False, True)]
    for row, (hidden, logits) in itertools.chain(*map(enumerate, ours)):
        length = len(SEQUENCES[row]) + 2
        assert_close(hidden, theirs["representations"][2][row, :length].numpy())
        assert_close(logits, theirs["logits"][row, :length].numpy())


@pytest.mark.parametrize("token_dropout", [True, False])
def test_esm2_equals_fair_esm(tmp_path: Path, token_dropout: bool) -> None:
    assert_parity(esm2(tmp_path / "any name.pt", token_dropout=token_dropout), tmp_path / "any name.pt")


@pytest.mark.parametrize("norm_before", [True, False])  # ESM-1b has it, ESM-1v has not
def test_esm1b_and_esm1v_equal_fair_esm(tmp_path: Path, norm_before: bool) -> None:
    path = tmp_path / "esm2 by name only.pt"
    assert_parity(esm1b(path, norm_before=norm_before), path)


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    esm2(tmp_path / "a.pt")
    whole = read_fair_esm(tmp_path / "a.pt")[1]
    content = load(tmp_path / "a.pt")
    content["model"] = {key: value.half() for key, value in content["model"].items()}
    torch.save(content, tmp_path / "a.pt")
    for name, tensor in read_fair_esm(tmp_path / "a.pt")[1].items():
        np.testing.assert_array_equal(tensor, whole[name].astype(np.float16).astype(np.float32))


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


def test_a_file_from_before_torch_1_6_is_read(tmp_path: Path) -> None:
    esm1b(tmp_path / "a.pt")
    torch.save(load(tmp_path / "a.pt"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new, old = read_fair_esm(tmp_path / "a.pt")[1], read_fair_esm(tmp_path / "old.pt")[1]
    assert new.keys() == old.keys()
    assert all(np.array_equal(new[name], old[name]) for name in new)
    whole = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(whole[:-1000])
    with pytest.raises(FormatError, match=r"old\.pt: not a checkpoint that can be loaded safely"):
        read_fair_esm(tmp_path / "old.pt")


def load(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


PLACE = "encoder.sentence_encoder.layers.1.fc2"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{PLACE}.bias", None, r"a\.pt: tensor 'layers\.1\.fc2\.bias' is missing; was the file copied completely"),
        (f"{PLACE}.weight", torch.zeros(32, 31), r"fc2\.weight': expected .* \[32, 128\], found .* \[32, 31\]"),
        (f"{PLACE}.bias", torch.zeros(32, dtype=torch.int64), r"expected floating-point .*, found int64"),
        (f"{PLACE}.bias", torch.full((32,), float("nan")), r"holds infinite or undefined numbers; get a fresh copy"),
        (f"{PLACE}.bias", torch.zeros(1).expand(32), r"its shape claims more numbers than are stored"),
        (f"{PLACE}.lora_A", torch.zeros(4, 32), r"'layers\.1\.fc2\.lora_A' is not part of .* merge adapters"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, name: str, tensor: Any, message: str) -> None:
    esm2(tmp_path / "a.pt")
    content = load(tmp_path / "a.pt")
    del content["model"][f"{PLACE}.bias"]
    content["model"][f"{PLACE}.bias"] = torch.zeros(32)
    if tensor is None:
        del content["model"][name]
    else:
        content["model"][name] = tensor
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=message):
        read_fair_esm(tmp_path / "a.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    esm2(tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"a\.pt: not a checkpoint that can be loaded safely"):
            read_fair_esm(tmp_path / "a.pt")


def test_tensors_that_share_their_memory_cannot_multiply_it(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    torch.save({"model": {str(number): shared for number in range(100)}}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt: its tensors claim 400,000 bytes and the file has [0-9,]+; not read"):
        read_fair_esm(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(1 << 20)}}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as to,
    ):
        for member in source.infolist():
            to.writestr(member.filename, source.read(member))
    with pytest.raises(FormatError, match=r"b\.pt: .* has compressed parts, which torch never writes"):
        read_fair_esm(tmp_path / "b.pt")


def test_numbers_beyond_all_encoders_are_refused(tmp_path: Path) -> None:
    esm2(tmp_path / "a.pt")
    content = load(tmp_path / "a.pt")
    content["cfg"]["model"].encoder_layers = 10**12
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt: an architecture that cannot be: .* <= 1024"):
        read_fair_esm(tmp_path / "a.pt")


def test_a_head_with_a_token_table_of_its_own_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    esm2(tmp_path / "a.pt")
    content = load(tmp_path / "a.pt")
    content["model"]["encoder.lm_head.weight"] = content["model"]["encoder.lm_head.weight"] + 1
    torch.save(content, tmp_path / "a.pt")
    assert not [name for name in read_fair_esm(tmp_path / "a.pt")[1] if name.startswith("lm_head.")]
    assert "language-model head left out" in caplog.text


def test_a_built_in_name_needs_no_file() -> None:
    config, _ = load_encoder_weights("esm1nv-44m", seed=1)
    assert config == EncoderConfig(trained=False)
