"""Tests of ``.nemo`` archives, built by hand to the documented layout, against Megatron's way to compute them."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.checkpoint import archive, read_encoder
from fedbio.encoder.checkpoint.huggingface_save import write_huggingface
from fedbio.errors import FormatError
from fedbio.vocabularies import VOCABULARIES
from fedbio.weights import inference_shapes, read_weights, weights_digest, write_weights

from .parity import SEQUENCES, assert_close, hidden_and_logits

LAYERS, HEADS, WIDTH, FFN, ROWS, POSITIONS = 2, 4, 32, 96, 128, 64
CONFIG = """
micro_batch_size: 8
seq_length: 64
max_position_embeddings: ${.seq_length}
num_layers: 2
hidden_size: 32
ffn_hidden_size: 96
num_attention_heads: 4
kv_channels: null
apply_query_key_layer_scaling: true
layernorm_epsilon: 1e-5
make_vocab_size_divisible_by: 128
position_embedding_type: learned_absolute
bert_binary_head: false
megatron_amp_O2: false
tensor_model_parallel_size: 1
tokenizer:
  library: sentencepiece
  model: nemo:0123456789abcdef_protein_sequence_sentencepiece.model
target: bionemo.model.protein.esm1nv.ESM1nvModel
"""

State = dict[str, NDArray[np.float32]]


def megatron_state() -> State:
    """Random tensors under Megatron's names: the rows of queries, keys and values are sorted by heads."""
    random = np.random.default_rng(5)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.normal(0.05, 0.2, shape).astype(np.float32)

    state = {
        "language_model.embedding.word_embeddings.weight": normal(ROWS, WIDTH),
        "language_model.embedding.position_embeddings.weight": normal(POSITIONS, WIDTH),
        "lm_head.bias": normal(ROWS),
    }
    maps = {"lm_head.dense": (WIDTH, WIDTH)}
    norms = ["lm_head.layernorm", "language_model.encoder.final_layernorm"]
    for layer in range(LAYERS):
        name = f"language_model.encoder.layers.{layer}"
        norms += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
        maps[f"{name}.self_attention.query_key_value"] = (3 * WIDTH, WIDTH)
        maps[f"{name}.self_attention.dense"] = (WIDTH, WIDTH)
        maps[f"{name}.mlp.dense_h_to_4h"] = (FFN, WIDTH)
        maps[f"{name}.mlp.dense_4h_to_h"] = (WIDTH, FFN)
    for name, (out, into) in maps.items():
        state |= {f"{name}.weight": normal(out, into), f"{name}.bias": normal(out)}
    for name in norms:
        state |= {f"{name}.weight": normal(WIDTH), f"{name}.bias": normal(WIDTH)}
    return state


def megatron_forward(
    state: State, tokens: list[int], *, tanh: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hidden states (L, D) and logits (L, V) of one protein in float64, as Megatron's code does it, step by step."""

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ state[f"{name}.weight"].T.astype(np.float64) + state[f"{name}.bias"]

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def fused_bias_gelu(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return u * 0.5 * (1 + np.tanh(0.79788456 * u * (1 + 0.044715 * u * u)))

    def gelu(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))

    table = state["language_model.embedding.word_embeddings.weight"].astype(np.float64)
    x = table[tokens] + state["language_model.embedding.position_embeddings.weight"][: len(tokens)]
    for layer in range(LAYERS):
        name = f"language_model.encoder.layers.{layer}"
        mixed = linear(norm(x, f"{name}.input_layernorm"), f"{name}.self_attention.query_key_value")
        # Megatron: [sq, np, 3 * hn] and then three parts along the last dimension
        by_head = mixed.reshape(len(tokens), HEADS, 3 * (WIDTH // HEADS))
        q, k, v = np.split(by_head, 3, axis=-1)
        scale = layer + 1  # apply_query_key_layer_scaling: divided here, multiplied back inside the softmax
        scores = np.einsum("qhe,khe->hqk", q, k) / (math.sqrt(WIDTH // HEADS) * scale) * scale
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khe->qhe", scores / scores.sum(-1, keepdims=True), v).reshape(len(tokens), WIDTH)
        x = x + linear(attended, f"{name}.self_attention.dense")
        u = linear(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp.dense_h_to_4h")
        x = x + linear(fused_bias_gelu(u) if tanh else gelu(u), f"{name}.mlp.dense_4h_to_h")
    hidden = norm(x, "language_model.encoder.final_layernorm")
    h = norm(gelu(linear(hidden, "lm_head.dense")), "lm_head.layernorm")
    return hidden, h @ table.T + state["lm_head.bias"]


def sentencepiece(pieces: tuple[str, ...]) -> bytes:
    """A model file by hand: for each piece field 1 (text), 2 (score, 32 bits) and 3 (kind); then trainer settings."""
    message = b""
    for number, piece in enumerate(pieces):
        text = piece.encode()
        entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(-number).tobytes() + b"\x18\x01"
        message += b"\x0a" + bytes([len(entry)]) + entry
    return message + b"\x12\x05\x20\x96\x01\x28\x02"


PIECES = VOCABULARIES["esm1nv"].pieces


def pack(
    path: Path,
    state: State,
    *,
    prefix: str = "model.",
    config: str = CONFIG,
    zipped: bool = False,
    dot: str = "./",
    tokenizer: bytes = sentencepiece(PIECES),
) -> Path:
    """Write the archive as ``tar -C folder -cf path .`` does, with the tokenizer beside."""
    weights = io.BytesIO()
    torch.save({prefix + name: torch.from_numpy(tensor) for name, tensor in state.items()}, weights)
    members = {
        f"{dot}model_config.yaml": config.encode(),
        f"{dot}0123456789abcdef_protein_sequence_sentencepiece.model": tokenizer,
        f"{dot}model_weights.ckpt": weights.getvalue(),
    }
    with tarfile.open(path, "w:gz" if zipped else "w") as target:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        target.addfile(folder)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return path


def numbers(sequence: str) -> list[int]:
    return [1, *ALPHABETS["esm1nv"].encode(sequence).tolist(), 2]


def relative(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "model.module.", ""])
def test_an_archive_computes_what_megatron_computes(tmp_path: Path, prefix: str, zipped: bool) -> None:
    state = megatron_state()
    loaded = read_encoder(pack(tmp_path / "esm1nv.nemo", state, prefix=prefix, zipped=zipped))
    config = loaded.config
    assert (loaded.form, config.name, config.trained, config.vocabulary, config.max_residues, config.activation) == (
        "nemo", "esm1nv", True, 128, 62, "gelu_tanh",
    )  # fmt: skip
    ours = [hidden_and_logits(config, loaded.weights, on_cpu=on_cpu) for on_cpu in (False, True)]
    for sequence, (hidden, logits) in zip(SEQUENCES * 2, itertools.chain(*ours), strict=True):
        their_hidden, their_logits = megatron_forward(state, numbers(sequence))
        assert_close(hidden, their_hidden.astype(np.float32))
        assert_close(logits, their_logits.astype(np.float32))
        # a cosine cannot see which GELU it was, the relative error can
        assert relative(hidden, their_hidden) < 1e-6
        assert relative(hidden, megatron_forward(state, numbers(sequence), tanh=False)[0]) > 2e-5


def test_the_settings_choose_the_gelu(tmp_path: Path) -> None:
    state = megatron_state()
    for number, line in enumerate(["bias_gelu_fusion: false", "esm_gelu: true"]):
        loaded = read_encoder(pack(tmp_path / f"{number}.nemo", state, config=f"{CONFIG}{line}\n"))
        assert loaded.config.activation == "gelu"
        hidden, _ = hidden_and_logits(loaded.config, loaded.weights)[0]
        assert relative(hidden, megatron_forward(state, numbers(SEQUENCES[0]), tanh=False)[0]) < 1e-6


def test_rows_read_as_three_blocks_would_be_seen(tmp_path: Path) -> None:
    state = megatron_state()
    loaded = read_encoder(pack(tmp_path / "a.nemo", state))
    wrong = dict(loaded.weights)
    for layer in range(LAYERS):
        for part in ("weight", "bias"):
            wrong[f"layers.{layer}.qkv.{part}"] = state[
                f"language_model.encoder.layers.{layer}.self_attention.query_key_value.{part}"
            ]
    hidden, _ = hidden_and_logits(loaded.config, wrong)[0]
    assert relative(hidden, megatron_forward(state, numbers(SEQUENCES[0]))[0]) > 0.01


def test_names_without_a_dot_and_the_settings_of_a_whole_run_are_read(tmp_path: Path) -> None:
    whole = "name: run\nmodel:\n" + "".join(f"  {line}\n" for line in CONFIG.strip().splitlines())
    one = read_encoder(pack(tmp_path / "a.nemo", megatron_state(), config=whole, dot=""))
    other = read_encoder(pack(tmp_path / "b.nemo", megatron_state()))
    assert weights_digest(one.weights) == weights_digest(other.weights)


def test_an_archive_becomes_our_folder_and_hugging_faces(tmp_path: Path) -> None:
    loaded = read_encoder(pack(tmp_path / "a.nemo", megatron_state()))
    write_weights(tmp_path / "ours", loaded.config, loaded.weights)
    config, weights = read_weights(tmp_path / "ours")
    assert config == loaded.config
    assert weights.keys() == loaded.weights.keys()
    assert weights_digest(weights) == weights_digest(loaded.weights)
    assert (tmp_path / "ours" / "vocab.txt").read_text().startswith("<unk>\n<s>\n</s>\n<pad>\n<mask>\nL\nA\n")
    assert write_huggingface(tmp_path / "theirs", loaded.config, loaded.weights) is False
    assert read_encoder(tmp_path / "theirs").weights.keys() == inference_shapes(config).keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("megatron_legacy: true", r"megatron_legacy is True, .* sorted in another way; save it again"),
        ("position_embedding_type: rope", r"position_embedding_type is 'rope', .* ESM-2nv is read from its origin"),
        ("tensor_model_parallel_size: 2", r"tensor_model_parallel_size is 2, .* merge the parts"),
        ("normalization: layernorm1p", r"normalization is 'layernorm1p'"),
        ("activation: swiglu", r"activation is 'swiglu'"),
        ("layernorm_epsilon: 1e-12", r"layernorm_epsilon is '1e-12'; fedbio computes with 1e-05 only"),
        ("max_position_embeddings: 512", r"max_position_embeddings is 512, but the table .* has 64 rows"),
        ("num_layers: 3", r"model_weights\.ckpt: tensor 'language_model\.encoder\.layers\.2\..*' is missing"),
        ("num_layers: 1", r"tensor 'language_model\.encoder\.layers\.1\..*' is not part of an encoder"),
        ("num_layers: 10000000000", r"an architecture that cannot be: .* <= 1024"),
        ("num_attention_heads: 3", r"width 32 is not a multiple of twice the number of heads, 3"),
        ("kv_channels: 16", r"kv_channels is 16"),
        ("ffn_hidden_size: 95", r"h_to_4h\.weight': expected .* \[95, 32\], found float32 of shape \[96, 32\]"),
        ("  bad: [", r"not valid YAML"),
        ("bad: [&a x, *a]", r"not valid YAML \(aliases are not read\)"),
    ],
)  # fmt: skip
def test_what_is_not_esm1nv_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(FormatError, match=rf"a\.nemo: .*{message}"):
        read_encoder(pack(tmp_path / "a.nemo", megatron_state(), config=f"{CONFIG}{line}\n"))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (sentencepiece((*PIECES[:5], "A", "L", *PIECES[7:])), r"token 5 is 'A', not 'L'"),
        (sentencepiece(VOCABULARIES["esm"].pieces), r"not the vocabulary of ESM-1nv"),
        (sentencepiece(PIECES)[:-9], r"not a SentencePiece model \(a field longer than the message\)"),
        (b"\xff" * 20, r"not a SentencePiece model \(a number of more than ten bytes\)"),
        (b"\x0b", r"not a SentencePiece model \(a field of unknown kind 3\)"),
        (b"\x0a\x03\x0a\x01\xff", r"not a SentencePiece model \('utf-8' codec"),
        (b"", r"token 0 is nothing, not"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path: Path, tokenizer: bytes, message: str) -> None:
    with pytest.raises(
        FormatError, match=rf"a\.nemo: 0123456789abcdef_protein_sequence_sentencepiece\.model: {message}"
    ):
        read_encoder(pack(tmp_path / "a.nemo", megatron_state(), tokenizer=tokenizer))


def test_a_vocabulary_as_text_is_held_to_the_same(tmp_path: Path) -> None:
    config = CONFIG.replace("library: sentencepiece", "vocab_file: nemo:a.vocab").encode()
    weights = io.BytesIO()
    torch.save({f"model.{name}": torch.from_numpy(each) for name, each in megatron_state().items()}, weights)
    members = {"./model_config.yaml": config, "./model_weights.ckpt": weights.getvalue()}
    good = "".join(f"{piece}\t0\n" for piece in PIECES).encode()
    assert read_encoder(tar(tmp_path / "a.nemo", *members.items(), ("./a.vocab", good))).config.vocabulary == 128
    with pytest.raises(FormatError, match=r"a\.nemo: a\.vocab: token 29 is nothing, not 'O'"):
        read_encoder(tar(tmp_path / "a.nemo", *members.items(), ("./a.vocab", good.removesuffix(b"O\t0\n"))))
    with pytest.raises(FormatError, match=r"a\.nemo: a\.vocab: not a vocabulary: not UTF-8 text"):
        read_encoder(tar(tmp_path / "a.nemo", *members.items(), ("./a.vocab", b"\xff")))


def test_a_table_too_small_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    state = megatron_state()
    state["language_model.embedding.word_embeddings.weight"] = np.zeros((29, WIDTH), np.float32)
    with pytest.raises(FormatError, match="a token table of 29 rows is too small for the alphabet 'esm1nv'"):
        read_encoder(pack(tmp_path / "a.nemo", state))


def tar(path: Path, *members: tuple[str, bytes | int], zipped: bool = False, kind: bytes = tarfile.REGTYPE) -> Path:
    """Write members given by name and content, or by name and a size that they only claim to have."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as target:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, int):
                member.size = content
                target.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))  # type: ignore[union-attr]
                target.offset += tarfile.BLOCKSIZE
            else:
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    path.write_bytes(gzip.compress(plain.getvalue()) if zipped else plain.getvalue())
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["../outside", "./x/../../outside", "/tmp/outside"])
def test_a_member_that_leads_out_is_refused(tmp_path: Path, name: str, zipped: bool) -> None:
    (tmp_path / "in").mkdir()
    path = tar(tmp_path / "in" / "a.nemo", (name, b"x"), ("./model_config.yaml", b"x"), zipped=zipped)
    with pytest.raises(FormatError, match=r"a\.nemo: member '.*outside' leads out of the archive; not unpacked"):
        read_encoder(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: tar(p, ("./other", HUGE)), r"'./other' brings the unpacked size to 1,099,511,627,776 bytes"),
        (lambda p: tar(p, ("./other", HUGE), zipped=True), r"'./other' brings the unpacked size to 1,099,511,627,776"),
        (lambda p: tar(p, ("./model_config.yaml", b"a" * 300_000)), r"says it has 300,000 bytes, more than"),
        (lambda p: tar(p, ("./model_config.yaml", 100_000)), r"ends after 10,[0-9]+ of 100,000 bytes|not a sound tar"),
        (lambda p: tar(p, ("./x", HUGE), kind=tarfile.XHDTYPE), r"not a sound tar archive.*claims to be enormous"),
        (lambda p: tar(p, ("./model_config.yaml", b"a"), kind=tarfile.SYMTYPE), r"is no plain file; not unpacked"),
        (lambda p: tar(p, *[("./model_config.yaml", b"a: 1")] * 2), r"'model_config\.yaml' occurs twice"),
        (lambda p: tar(p, *[(f"./{n}", b"") for n in range(1001)]), r"more than 1000 members"),
        (lambda p: tar(p, ("./model_config.yaml", b"a: 1")), r"no model_weights\.ckpt in the archive"),
        (lambda p: tar(p, ("./model_config.yaml", b"\xff"), ("./model_weights.ckpt", b"x")), r"not valid YAML"),
        (lambda p: tar(p, ("./model_config.yaml", b"- 1"), ("./model_weights.ckpt", b"x")), r"holds no settings"),
        (
            lambda p: tar(p, ("./model_config.yaml", b"a: 1"), ("./model_weights.ckpt", b"x")),
            r"model_weights\.ckpt: not a checkpoint that can be loaded safely",
        ),
        (lambda p: p.write_bytes(b"no archive at all" * 100) and p, r"neither a torch file .* nor a tar archive"),
        (lambda p: p.write_bytes(b"\x1f\x8b" + b"x" * 100) and p, r"not a sound tar archive, plain or gzip"),
    ],
)  # fmt: skip
def test_a_hostile_or_damaged_archive_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(FormatError, match=rf"a\.nemo: .*({message})"):
        read_encoder(make(tmp_path / "a.nemo"))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_archive_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = pack(tmp_path / "a.nemo", megatron_state(), zipped=zipped)
    whole = path.read_bytes()
    for size in (600, 5000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"a\.nemo: "):
            read_encoder(path)


def test_what_expands_without_end_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_MIN_ALLOWED", 1 << 20)
    path = tar(tmp_path / "a.nemo", ("./zeros", bytes(2 << 20)), ("./model_config.yaml", b"a: 1"), zipped=True)
    with pytest.raises(FormatError, match=r"'./zeros' brings the unpacked size to 2,097,152 bytes, from [0-9,]+; not"):
        read_encoder(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    weights = io.BytesIO()
    torch.save({"model.x": Trap()}, weights)
    path = tar(
        tmp_path / "a.nemo", ("./model_config.yaml", CONFIG.encode()), ("./model_weights.ckpt", weights.getvalue())
    )
    with pytest.raises(FormatError, match=r"a\.nemo: model_weights\.ckpt: not a checkpoint that can be loaded safely"):
        read_encoder(path)
    assert not (tmp_path / "sprung").exists()
