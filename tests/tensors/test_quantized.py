from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from fedbio.errors import FormatError
from fedbio.tensors import SCHEMES, LayoutReader, chunks, encoded_size, parse, quantized_chunks, quantized_size
from fedbio.tensors.quantize import SEGMENT_VALUES, decode, encode

RANDOM = np.random.default_rng(11)

MODEL = {
    "weight": RANDOM.standard_normal((600, 1001)).astype(np.float32),  # two whole segments and a part
    "bias": RANDOM.standard_normal(1023).astype(np.float32),
    "enough": RANDOM.standard_normal(1025).astype(np.float32),
    "steps": np.arange(2000),
    "double": RANDOM.standard_normal((3, 500)),
    "half": RANDOM.standard_normal(2000).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def read(parts: Any) -> dict[str, np.ndarray[Any, Any]]:
    reader = LayoutReader()
    values: dict[str, list[np.ndarray[Any, Any]]] = {}
    for part in parts:
        for piece in reader.feed(part):
            assert piece.start == sum(map(len, values.get(piece.name, [])))
            values.setdefault(piece.name, []).append(piece.values.copy())
    reader.finish()
    assert reader.specs is not None
    return {
        name: np.concatenate([np.empty(0, dtype), *values.get(name, [])]).reshape(shape)
        for name, (shape, dtype) in reader.specs.items()
    }


def by_definition(scheme: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = tensor.reshape(-1)
    parts = [flat[start : start + SEGMENT_VALUES] for start in range(0, flat.size, SEGMENT_VALUES)]
    decoded = [decode(scheme, encode(scheme, part).data, part.size) for part in parts]
    return np.concatenate(decoded).reshape(tensor.shape).astype(tensor.dtype)


def layout(entries: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_layout_has_the_documented_bytes() -> None:
    joined = b"".join(quantized_chunks({"x": np.ones(1024, np.float32), "n": np.array([7], np.int64)}, "nf4"))
    assert joined[8:].startswith(
        b'{"__metadata__":{"fedbio.quantized":"{\\"x\\":{\\"scheme\\":\\"nf4\\",\\"dtype\\":\\"F32\\",'
        b'\\"shape\\":[1024]}}"},"x":{"dtype":"U8","shape":[576],"data_offsets":[0,576]},'
        b'"n":{"dtype":"I64","shape":[1],"data_offsets":[576,584]}}'
    )
    assert joined[-584:] == b"\0\0\x80?" * 16 + b"\xff" * 512 + b"\7\0\0\0\0\0\0\0"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_chunks_have_the_size_asked_for_and_the_whole_is_known_beforehand(scheme: str, size: int) -> None:
    sizes = [len(chunk) for chunk in quantized_chunks(MODEL, scheme, size)]
    assert set(sizes[:-1]) <= {size}
    assert 0 < sizes[-1] <= size
    assert sum(sizes) == quantized_size(MODEL, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_stay_as_they_were_while_later_ones_are_made(scheme: str) -> None:
    held = list(quantized_chunks(MODEL, scheme, 4096))
    at_once = [bytes(chunk) for chunk in quantized_chunks(MODEL, scheme, 4096)]
    assert [bytes(chunk) for chunk in held] == at_once


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reader_returns_what_the_scheme_keeps_and_small_tensors_and_integers_exactly(scheme: str) -> None:
    tensors = read(quantized_chunks(MODEL, scheme))
    assert list(tensors) == list(MODEL)
    exact = {"bias", "steps", "empty"} | ({"half"} if scheme in ("float16", "bfloat16") else set())
    for name, tensor in MODEL.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor if name in exact else by_definition(scheme, tensor))
        if name not in exact:
            assert (tensors[name] != tensor).any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1, 3, 777])
def test_chunk_boundaries_may_fall_anywhere(scheme: str, size: int) -> None:
    model = {"odd": np.ones(3, np.uint8), "weight": MODEL["weight"][:5], "bias": MODEL["bias"]}
    whole = b"".join(quantized_chunks(model, scheme))
    tensors = read(whole[begin : begin + size] for begin in range(0, len(whole), size))
    np.testing.assert_array_equal(tensors["weight"], by_definition(scheme, model["weight"]))
    np.testing.assert_array_equal(tensors["bias"], model["bias"])


@settings(max_examples=30)
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    counts=st.lists(st.integers(0, 3000), max_size=4),
    cuts=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
)
def test_any_model_comes_back_however_it_is_cut(scheme: str, counts: list[int], cuts: list[int]) -> None:
    model = {str(number): RANDOM.standard_normal(count).astype(np.float32) for number, count in enumerate(counts)}
    whole = b"".join(quantized_chunks(model, scheme))
    assert len(whole) == quantized_size(model, scheme)
    parts, begin = [], 0
    while begin < len(whole):
        parts.append(whole[begin : begin + cuts[len(parts) % len(cuts)]])
        begin += len(parts[-1])
    tensors = read(parts)
    for name, tensor in model.items():
        expected = by_definition(scheme, tensor) if tensor.size >= 1024 else tensor
        np.testing.assert_array_equal(tensors[name], expected)


def test_the_safetensors_library_reads_quantized_tensors_as_bytes() -> None:
    stored = load(b"".join(quantized_chunks(MODEL, "int8")))
    assert stored["weight"].dtype == np.uint8
    assert stored["weight"].shape == (600_600 + 4 * 147,)
    np.testing.assert_array_equal(stored["bias"], MODEL["bias"])


def test_views_that_are_not_contiguous_or_not_little_endian_are_written_right() -> None:
    model = {"strided": MODEL["weight"].T, "big": MODEL["weight"].astype(">f4")}
    tensors = read(quantized_chunks(model, "int8"))
    np.testing.assert_array_equal(tensors["strided"], by_definition("int8", np.ascontiguousarray(MODEL["weight"].T)))
    np.testing.assert_array_equal(tensors["big"], by_definition("int8", MODEL["weight"]))


def llama_3_2_1b() -> dict[str, np.ndarray[Any, Any]]:
    """Return the shapes of the model that the paper quantizes, 5.7 GB of float32, without its values."""
    shapes = {
        "model.embed_tokens.weight": (128_256, 2048),
        "lm_head.weight": (128_256, 2048),
        "model.norm.weight": (2048,),
    }
    for layer in range(16):
        for name, shape in {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (512, 2048),
            "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (8192, 2048),
            "mlp.up_proj": (8192, 2048),
            "mlp.down_proj": (2048, 8192),
            "input_layernorm": (2048,),
            "post_attention_layernorm": (2048,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("scheme", "percent"), [("float16", 50.00), ("bfloat16", 50.00), ("int8", 25.03), ("fp4", 14.07), ("nf4", 14.07)]
)
def test_sizes_are_at_most_the_papers_on_its_model(scheme: str, percent: float) -> None:
    model = llama_3_2_1b()
    assert 100 * quantized_size(model, scheme) / encoded_size(model) < percent + 0.005
    assert encoded_size(model) // 2**20 == 5716


def test_value_that_cannot_be_quantized_is_refused_in_the_name_of_its_tensor() -> None:
    model = {"fine": np.ones(2000, np.float32), "bad": np.full(2000, 1e6, np.float32)}
    with pytest.raises(FormatError, match=r"tensor 'bad': the value 1e\+06 is too large for float16; use bfloat16"):
        list(quantized_chunks(model, "float16"))


def test_unknown_scheme_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="unknown scheme 'int4'; known are float16, bfloat16, int8, fp4, nf4"):
        quantized_chunks(MODEL, "int4")


def test_plain_layouts_are_read_the_same_by_both_readers() -> None:
    whole = b"".join(chunks(MODEL))
    parsed = parse(whole)
    for name, tensor in read([whole]).items():
        np.testing.assert_array_equal(tensor, parsed[name])


def quantized(what: Any, stored: int = 576, dtype: str = "U8") -> bytes:
    text = what if isinstance(what, str) else json.dumps(what)
    shape = [stored] if dtype == "U8" else [stored // 4]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, stored]}
    return layout({"__metadata__": {"fedbio.quantized": text}, "x": entry}, bytes(stored))


def spec(scheme: Any = "nf4", dtype: Any = "F32", shape: Any = (1024,)) -> dict[str, Any]:
    return {"scheme": scheme, "dtype": dtype, "shape": shape}


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (quantized("{"), "metadata 'fedbio.quantized' is not valid JSON: "),
        (quantized("[]"), "metadata 'fedbio.quantized' is not a JSON object"),
        (quantized("[" * 100_000), "metadata 'fedbio.quantized' is not valid JSON: "),
        (quantized('{"x":1,"x":2}'), "metadata 'fedbio.quantized' names 'x' twice"),
        (quantized({"x": 1}), "tensor 'x': malformed header entry: Expected `object`, got `int`"),
        (
            quantized({"x": {**spec(), "more": 1}}),
            "tensor 'x': malformed header entry: Object contains unknown",
        ),
        (quantized({"y": spec()}), "tensor 'y': quantized, but not in the header"),
        (
            quantized({"x": spec(scheme="int4")}),
            "tensor 'x': quantized as 'int4'; accepted here: float16, bfloat16",
        ),
        (quantized({"x": spec(dtype="I32")}), "tensor 'x': quantized from 'I32', which is not a float dtype"),
        (quantized({"x": spec(dtype="F33")}), "tensor 'x': quantized from 'F33', which is not a float dtype"),
        (quantized({"x": spec(shape=[-1])}), "tensor 'x': negative dimension in shape [-1]"),
        (quantized({"x": spec(shape=[1] * 17)}), "tensor 'x': 17 dimensions, at most 16 are allowed"),
        (quantized({"x": spec(shape=[2**40, 2**40])}), "overflows"),
        (
            quantized({"x": spec(shape=[2**40])}),
            "of shape [1099511627776] is stored as U8 [618475290624], found U8",
        ),
        (quantized({"x": spec()}, 572), "tensor 'x': nf4 of shape [1024] is stored as U8 [576], found U8 [572]"),
        (
            quantized({"x": spec()}, 576, "F32"),
            "nf4 of shape [1024] is stored as U8 [576], found F32 [144]",
        ),
    ],
)
def test_each_way_for_the_metadata_to_be_malformed_has_its_own_text(buffer: bytes, text: str) -> None:
    with pytest.raises(FormatError) as refused:
        list(LayoutReader().feed(buffer))
    assert text in str(refused.value)


def test_scheme_that_was_not_agreed_is_refused() -> None:
    whole = b"".join(quantized_chunks({"x": np.ones(1024, np.float32)}, "nf4"))
    assert list(LayoutReader(schemes=["nf4"]).feed(whole))
    with pytest.raises(FormatError, match="tensor 'x': quantized as 'nf4'; accepted here: bfloat16, int8"):
        list(LayoutReader(schemes={"int8", "bfloat16"}).feed(whole))
    with pytest.raises(FormatError, match="tensor 'x': quantized as 'nf4'; accepted here: none"):
        list(LayoutReader(schemes=()).feed(whole))


def test_hostile_scale_is_refused_in_the_name_of_its_tensor() -> None:
    whole = quantized({"x": spec()})
    damaged = whole[:-576] + struct.pack("<f", float("inf")) + whole[-572:]
    with pytest.raises(FormatError, match="tensor 'x': the scale of a block is not a finite number >= 0"):
        list(LayoutReader().feed(damaged))


def test_tensors_named_as_exact_travel_as_they_are() -> None:
    model = {"x": np.linspace(0, 1, 2000, dtype=np.float32), "scale": np.linspace(1, 2, 2000, dtype=np.float32)}
    whole = b"".join(quantized_chunks(model, "nf4", exact={"scale"}))
    assert len(whole) == quantized_size(model, "nf4", exact={"scale"})
    pieces = {piece.name: piece.values.copy() for piece in LayoutReader().feed(whole)}
    np.testing.assert_array_equal(pieces["scale"], model["scale"])
    assert not np.array_equal(pieces["x"], model["x"])
