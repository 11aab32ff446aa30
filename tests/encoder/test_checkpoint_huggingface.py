"""Tests that Hugging Face folders give Hugging Face's numbers, and that what we write for it is loaded by it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.checkpoint import load_encoder_weights, read_encoder
from fedbio.encoder.checkpoint.huggingface_save import write_huggingface
from fedbio.errors import DataError, FormatError
from fedbio.vocabularies import VOCABULARIES
from fedbio.weights import EncoderConfig, Weights, head_shapes, inference_shapes, weights_digest

from .conftest import TINY
from .parity import SEQUENCES, assert_close, hidden_and_logits, randomize

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 66,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
KINDS = {
    "esm2": {"position_embedding_type": "rotary", "token_dropout": True},
    "esm2 without token dropout": {"position_embedding_type": "rotary", "token_dropout": False},
    "esm1b": {"position_embedding_type": "absolute", "token_dropout": True, "emb_layer_norm_before": True},
    "esm1v": {"position_embedding_type": "absolute", "token_dropout": True, "emb_layer_norm_before": False},
}


def save(folder: Path, kind: str, *, head: bool = True, shard: str = "1GB") -> Any:
    """Save a random model as transformers does, with the vocabulary beside it."""
    config = transformers.EsmConfig(**SMALL, **KINDS[kind])
    model = randomize(transformers.EsmForMaskedLM(config) if head else transformers.EsmModel(config))
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARIES["esm"].pieces))
    return model


def padded(alphabet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All sequences as one batch and its attention mask."""
    known, letters = VOCABULARIES[alphabet], ALPHABETS[alphabet]
    longest = max(map(len, SEQUENCES)) + 2
    tokens = torch.full((len(SEQUENCES), longest), known.pieces.index(known.padding))
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(SEQUENCES):
        tokens[row, : len(sequence) + 2] = torch.tensor(
            [letters.start, *letters.encode(sequence).tolist(), letters.end]
        )
        mask[row, : len(sequence) + 2] = 1
    return tokens, mask


def assert_parity(model: Any, config: EncoderConfig, weights: Weights) -> None:
    """Compare hidden states, and logits where the model has a head, theirs computed on one padded batch."""
    tokens, mask = padded(config.alphabet)
    with torch.no_grad():
        theirs = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    last = theirs.hidden_states[-1] if hasattr(theirs, "logits") else theirs.last_hidden_state
    ours = [hidden_and_logits(config, weights, on_cpu=on_cpu) for on_cpu in (False, True)]
    for row, (hidden, logits) in itertools.chain(*map(enumerate, ours)):
        length = len(SEQUENCES[row]) + 2
        assert_close(hidden, last[row, :length].numpy())
        if hasattr(theirs, "logits"):
            assert_close(logits, theirs.logits[row, :length].numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_esm_equals_transformers(tmp_path: Path, kind: str) -> None:
    model = save(tmp_path / "facebook", kind)
    loaded = read_encoder(tmp_path / "facebook")
    assert (loaded.form, loaded.config.name, loaded.config.max_residues) == ("huggingface", "facebook", 62)
    assert_parity(model, loaded.config, loaded.weights)


def test_a_model_without_a_head_is_read(tmp_path: Path) -> None:
    model = save(tmp_path, "esm1b", head=False)
    config, weights = load_encoder_weights(tmp_path)
    assert weights.keys() == inference_shapes(config).keys()
    assert_parity(model, config, weights)


@pytest.mark.parametrize("form", ["parts", "bin", "bin in parts", "bfloat16"])
def test_every_form_of_the_weights_gives_the_same_encoder(tmp_path: Path, form: str) -> None:
    save(tmp_path / "whole", "esm2")
    save(tmp_path / "other", "esm2", shard="40KB" if form == "parts" else "1GB")
    whole = load_encoder_weights(tmp_path / "whole")[1]
    single = tmp_path / "other" / "model.safetensors"
    if form == "parts":
        assert len(list((tmp_path / "other").glob("model-0000*.safetensors"))) > 1
    else:
        tensors = load_file(single)
        single.unlink()
    if form == "bin":
        torch.save(tensors, tmp_path / "other" / "pytorch_model.bin")
    elif form == "bin in parts":
        names = sorted(tensors)
        for part, chosen in (("a.bin", names[:9]), ("b.bin", names[9:])):
            torch.save({name: tensors[name] for name in chosen}, tmp_path / "other" / part)
        index = {"weight_map": {name: "a.bin" if name in names[:9] else "b.bin" for name in names}}
        (tmp_path / "other" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form == "bfloat16":
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, single, {"format": "pt"})
        whole = {name: torch.from_numpy(tensor).bfloat16().float().numpy() for name, tensor in whole.items()}
    again = load_encoder_weights(tmp_path / "other")[1]
    assert weights_digest(again) == weights_digest(whole)
    np.testing.assert_array_equal(again["lm_head.dense.weight"], whole["lm_head.dense.weight"])


@pytest.mark.parametrize("kind", ["esm2", "esm1b"])
def test_names_and_leftovers_of_the_published_files_are_read(tmp_path: Path, kind: str) -> None:
    model = save(tmp_path, kind)
    # what lies in facebook/esm2_t6_8M_UR50D and its kin, as written by transformers 4
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    tensors["esm.embeddings.position_ids"] = torch.arange(66)[None]
    tensors["esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq"] = torch.ones(4)
    tensors.setdefault("esm.embeddings.position_embeddings.weight", torch.ones(66, 32))
    assert "esm.encoder.layer.0.LayerNorm.weight" in tensors
    assert "lm_head.decoder.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_parity(model, *load_encoder_weights(tmp_path))


def random_weights(config: EncoderConfig, *, head: bool) -> Weights:
    random = np.random.default_rng(11)
    shapes = inference_shapes(config) | (head_shapes(config) if head else {})
    return {name: random.normal(0.05, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


ESM2 = EncoderConfig(
    name="small-esm2", layers=2, heads=4, width=32, ffn=128, vocabulary=33, max_tokens=64, alphabet="esm",
    positions="rotary", activation="gelu", token_scale=0.88,
)  # fmt: skip
WRITTEN = {
    "esm2": ESM2,
    "esm1b": EncoderConfig(
        name="small-esm1b", layers=2, heads=4, width=32, ffn=96, vocabulary=33, max_tokens=64, alphabet="esm",
        positions="learned", activation="gelu", token_scale=0.88, embedding_norm=True,
    ),
    "letters of esm1nv, exact gelu": EncoderConfig(
        name="other", layers=1, heads=2, width=32, ffn=96, max_tokens=64, activation="gelu", trained=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", WRITTEN)
def test_transformers_loads_what_is_written_and_computes_the_same(tmp_path: Path, kind: str, head: bool) -> None:
    config = WRITTEN[kind]
    weights = random_weights(config, head=head)
    assert write_huggingface(tmp_path, config, weights) is head
    loader = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    model = loader.from_pretrained(tmp_path).eval()
    assert_parity(model, config, weights)
    again = read_encoder(tmp_path)
    assert again.config == config
    assert again.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(again.weights[name], tensor)


def test_esm1nv_becomes_megatron_bert_without_its_head(tmp_path: Path) -> None:
    config = EncoderConfig(name="nv", layers=2, heads=4, width=32, ffn=64, max_tokens=64)
    weights = random_weights(config, head=True)
    assert write_huggingface(tmp_path, config, weights) is False
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(model).__name__ == "MegatronBertModel"
    assert_parity(model, config, {name: weights[name] for name in inference_shapes(config)})
    again = read_encoder(tmp_path)
    assert again.config == config
    assert weights_digest(again.weights) == weights_digest(weights)


@pytest.mark.parametrize("config", [WRITTEN["esm2"], WRITTEN["letters of esm1nv, exact gelu"], TINY])
def test_the_written_tokenizer_gives_our_numbers(tmp_path: Path, config: EncoderConfig) -> None:
    write_huggingface(tmp_path, config, random_weights(config, head=False))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens, mask = padded(config.alphabet)
    theirs = tokenizer(SEQUENCES, padding=True, return_tensors="pt")
    assert theirs["input_ids"].tolist() == tokens.tolist()
    assert theirs["attention_mask"].tolist() == mask.tolist()


def test_what_no_model_of_hugging_face_computes_is_refused(tmp_path: Path) -> None:
    config = EncoderConfig(name="odd", layers=1, heads=2, width=32, ffn=64, positions="rotary")
    with pytest.raises(DataError, match="odd: no model of Hugging Face computes gelu_tanh with rotary positions"):
        write_huggingface(tmp_path / "x", config, random_weights(config, head=False))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"config\.json: model_type 'bert'; of Hugging Face 'esm'"),
        ({"layer_norm_eps": 1e-12}, r"config\.json: layer_norm_eps is 1e-12; fedbio computes with 1e-05 only"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type is 'relative_key'"),
        ({"pad_token_id": 0}, "pad_token_id is 0; fedbio computes with 1 only"),
        ({"rope_parameters": {"rope_theta": 500.0}}, r"rope_theta is 500\.0; fedbio computes with 10000 only"),
        ({"is_folding_model": True}, "is_folding_model is set; give a plain encoder"),
        ({"num_hidden_layers": 10**15}, r"an architecture that cannot be: .* <= 1024"),
        ({"num_hidden_layers": "2"}, r"an architecture that cannot be: Expected `int`, got `str` - at `\$\.layers`"),
        ({"num_attention_heads": 5}, "width 32 is not a multiple of twice the number of heads, 5"),
        ({"num_hidden_layers": 3}, r"model\.safetensors: tensor 'encoder\.layer\.2\.attention.* is missing"),
        ({"intermediate_size": 95}, r"tensor 'encoder\.layer\.0\.intermediate\.dense\.weight': expected .* \[95, 32\]"),
        ({"num_hidden_layers": 1}, r"tensor 'encoder\.layer\.1\..*' is not part of an encoder of this kind"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path, "esm2")
    path = tmp_path / "config.json"
    config = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        read_encoder(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", r"config\.json: not valid JSON"),
        ("config.json", b"[]", r"config\.json: not a JSON object"),
        ("config.json", b"{}", r"says neither 'format' .* nor 'model_type'"),
        ("vocab.txt", b"<cls>\n<eos>\n", r"vocab\.txt: token 0 is '<cls>', not '<unk>'"),
        ("vocab.txt", b"A\n" * 40_000, r"vocab\.txt: 80,000 bytes are too many"),
        ("vocab.txt", b"\xff\xfe", r"vocab\.txt: not a vocabulary: not UTF-8 text"),
        ("model.safetensors", b"\xff" * 100, r"model\.safetensors: not a readable safetensors file .* copy it again"),
        (
            "model.safetensors",
            (100).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}}'.ljust(104),
            r"model\.safetensors: not a readable safetensors file",
        ),
        ("model.safetensors", b"", r"model\.safetensors: not a readable safetensors file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    save(tmp_path, "esm2")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_encoder(tmp_path)


def test_a_part_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "good", "esm2")
    save(tmp_path / "evil", "esm2")
    (tmp_path / "evil" / "model.safetensors").unlink()
    index = tmp_path / "evil" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../good/model.safetensors"}}))
    with pytest.raises(FormatError, match=r"names parts that are no plain file names in the same folder; not followed"):
        read_encoder(tmp_path / "evil")
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FormatError, match=r"model-00001-of-00002\.safetensors: not found; the folder is not complete"):
        read_encoder(tmp_path / "evil")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    save(tmp_path / "x", "esm2")
    (tmp_path / "x" / "model.safetensors").unlink()
    torch.save({"esm.x": Trap()}, tmp_path / "x" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: not a checkpoint that can be loaded safely"):
        read_encoder(tmp_path / "x")
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_vocabulary_is_not_guessed(tmp_path: Path) -> None:
    model = transformers.EsmModel(transformers.EsmConfig(**{**SMALL, "vocab_size": 40}, **KINDS["esm2"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"vocab\.txt: not found; without it nobody knows"):
        read_encoder(tmp_path)
