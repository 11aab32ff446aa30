from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedbio.errors import PeerUnreachable, ProtocolError
from fedbio.tensors import SiteFault, chunks, manifest, mean_chunks, mean_size, parse, weighted_mean
from fedbio.tensors.layout import manifest_header

F = np.float32
WEIGHTS = {"site-1": 10.0, "site-2": 7.0, "site-3": 0.0}


def model(seed: int) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    return {
        "empty": np.zeros((0, 2), F),
        "w": dice.standard_normal((1_000, 600)).astype(F),
        "count": np.array(seed, np.int64),
        "half": dice.standard_normal(5).astype(np.float16),
    }


MODELS = {name: model(n) for n, name in enumerate(WEIGHTS)}
MANIFEST = manifest(MODELS["site-1"])


def streams(size: int = 1 << 20, **changed: Any) -> dict[str, Any]:
    return {name: chunks(tensors, size) for name, tensors in MODELS.items()} | {
        name.replace("_", "-"): value for name, value in changed.items()
    }


def whole(tensors: dict[str, np.ndarray]) -> bytes:
    return b"".join(bytes(chunk) for chunk in chunks(tensors))


@pytest.mark.parametrize("size", [1 << 20, 65_537])
def test_streams_average_to_the_bits_of_models_in_memory(size: int) -> None:
    mean = parse(b"".join(mean_chunks(streams(size), WEIGHTS, MANIFEST)))
    expected = weighted_mean([(name, tensors, WEIGHTS[name]) for name, tensors in MODELS.items()])
    assert list(mean) == list(expected)
    for name, tensor in expected.items():
        assert mean[name].tobytes() == tensor.tobytes()
        assert (mean[name].shape, mean[name].dtype) == (tensor.shape, tensor.dtype)


def test_chunks_may_end_anywhere_and_differ_between_sites() -> None:
    odd = streams(99_991, site_2=chunks(MODELS["site-2"], 1 << 20), site_3=iter([whole(MODELS["site-3"])]))
    assert b"".join(mean_chunks(odd, WEIGHTS, MANIFEST)) == b"".join(mean_chunks(streams(), WEIGHTS, MANIFEST))


def test_chunks_are_of_one_mebibyte_and_may_be_kept() -> None:
    kept = list(mean_chunks(streams(), WEIGHTS, MANIFEST))
    copies = [bytes(chunk) for chunk in mean_chunks(streams(), WEIGHTS, MANIFEST)]
    assert [bytes(chunk) for chunk in kept] == copies
    assert {len(chunk) for chunk in kept[1:-1]} == {1 << 20}
    assert 0 < len(kept[-1]) <= 1 << 20
    assert sum(map(len, kept)) == mean_size(MANIFEST)


def test_quantized_stream_counts_as_what_it_decodes_to() -> None:
    # a model whose float32 values are float16 numbers, one of them quantized as such: nothing is lost
    exact = {"w": np.arange(2_000, dtype=np.float16).astype(F)}
    stored = exact["w"].astype(np.float16).view(np.uint8)
    description = '{"w":{"scheme":"float16","dtype":"F32","shape":[2000]}}'
    quantized = chunks({"w": stored}, metadata={"fedbio.quantized": description})
    mean = mean_chunks({"a": quantized, "b": chunks(exact)}, {"a": 1, "b": 2}, manifest(exact))
    np.testing.assert_array_equal(parse(b"".join(mean))["w"], exact["w"])


def test_no_stream_runs_ahead_of_the_others() -> None:
    pulled = dict.fromkeys(WEIGHTS, 0)

    def counted(name: str) -> Iterator[memoryview]:
        for chunk in chunks(MODELS[name], 4_096):
            pulled[name] += 1
            assert max(pulled.values()) - min(pulled.values()) <= 2
            yield chunk

    for _ in mean_chunks({name: counted(name) for name in WEIGHTS}, WEIGHTS, MANIFEST):
        pass
    assert min(pulled.values()) > 500


def changed(**tensors: np.ndarray) -> Iterator[memoryview]:
    return chunks({**MODELS["site-2"], **tensors}, 4_096)


def spoiled(value: float) -> np.ndarray:
    tensor = MODELS["site-2"]["w"].copy()
    tensor[900, 7] = value
    return tensor


def broken() -> Iterator[memoryview]:
    yield next(changed())
    raise PeerUnreachable("the connection to site-2 is gone")


FAULTS = {
    "nan": (lambda: changed(w=spoiled(np.nan)), "tensor 'w': value 540007 is not finite"),
    "infinite": (lambda: changed(w=spoiled(np.inf)), "tensor 'w': value 540007 is not finite"),
    "shape": (lambda: changed(w=np.ones(3, F)), r"tensor 'w': float32 \[3\], expected float32 \[1000, 600\]"),
    "dtype": (lambda: changed(half=np.ones(5, F)), r"tensor 'half': float32 \[5\], expected float16 \[5\]"),
    "extra": (lambda: changed(more=np.ones(3, F)), "unexpected: 'more'"),
    "order": (lambda: chunks(dict(reversed(MODELS["site-2"].items()))), "come in another order than the task's"),
    "malformed": (lambda: iter([b"\xff" * 100]), "header of .* is larger than"),
    "short": (lambda: iter([whole(MODELS["site-2"])[:-1]]), "tensor 'half': ends at element 4 of 5"),
    "long": (lambda: iter([whole(MODELS["site-2"]), b"more"]), "4 bytes after the last tensor belong to none"),
    "nothing": (lambda: iter([]), "the stream ended within its header"),
    "broken": (broken, "the connection to site-2 is gone"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_stream_at_fault_is_named_before_the_mean_is_whole(fault: str) -> None:
    stream, text = FAULTS[fault]
    passed = 0
    with pytest.raises(SiteFault, match=f"site-2: .*{text}") as caught:
        for chunk in mean_chunks(streams(site_2=stream()), WEIGHTS, MANIFEST):
            passed += len(chunk)
    assert caught.value.site == "site-2"
    assert passed < sum(map(len, mean_chunks(streams(), WEIGHTS, MANIFEST)))


def test_mean_beyond_float32_is_nobodys_fault_alone() -> None:
    huge = {"w": np.full(3, 1e300)}
    with pytest.raises(ProtocolError, match="the mean is too large for float32"):
        list(mean_chunks({"a": chunks(huge)}, {"a": 1}, manifest(huge)))


def test_memory_is_a_few_chunks_whatever_the_size() -> None:
    large = {"w": ((16 << 20,), np.dtype(F))}

    def made() -> Iterator[memoryview]:
        yield memoryview(manifest_header(large))
        chunk = memoryview(np.ones(1 << 18, F).view(np.uint8))
        for _ in range(64):
            yield chunk

    tracemalloc.start()
    for _ in mean_chunks({"a": made(), "b": made()}, {"a": 1, "b": 1}, large):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
