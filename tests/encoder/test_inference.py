"""Tests of the choice of device and arithmetic, and of packs that do not fit into memory."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch

from fedbio.encoder import inference
from fedbio.encoder.inference import Inference, choose_device, choose_dtype
from fedbio.encoder.packs import make_plan
from fedbio.encoder.pooling import Pooling
from fedbio.errors import MachineError, SettingsError
from fedbio.weights import Weights

from .conftest import TINY, slow_encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_only_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_dtype("auto", CPU) == expected


@pytest.mark.parametrize("name", ["gpu", "meta", "mps:x"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"device '{name}': expected auto, cpu, cuda or cuda:NUMBER"):
        choose_device(name)


def test_a_missing_device_is_this_machines_matter() -> None:
    with pytest.raises(MachineError, match=r"device 'cuda:99': this machine has [0-9]+ CUDA devices"):
        choose_device("cuda:99")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(SettingsError, match="dtype 'float16': expected auto, float32, bfloat16 or int8"):
        choose_dtype("float16", CPU)


def test_int8_is_for_a_cpu() -> None:
    assert choose_dtype("int8", CPU) == torch.int8
    with pytest.raises(SettingsError, match="dtype 'int8': only a CPU computes it, not cuda; use bfloat16"):
        choose_dtype("int8", torch.device("cuda"))


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(tiny_weights: Weights, layer: int) -> None:
    with pytest.raises(SettingsError, match=f"layer {layer}: tiny has layers 0 to 2"):
        Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1, layer=layer)


class Cramped(Inference):
    """Memory for three pieces, no more."""

    spans: list[tuple[int, int]]

    def _compute(self, sequences: Any, plan: Any, first: int, last: int) -> Any:
        if last - first > 3:
            raise torch.OutOfMemoryError
        self.spans.append((first, last))
        return super()._compute(sequences, plan, first, last)


SEQUENCES = [b"MKVLAAGIVG", b"LCAKAYWTPQ", b"DENRHFS", b"MKVLA", b"ACD", b"GHIKL", b"M"]


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("windows", [False, True])
def test_every_pooling_is_one_of_the_same_residues(tiny_weights: Weights, windows: bool, layer: int | None) -> None:
    sequences = [b"ACDEFGHIKLMNPQRSTVWY" * 4, *SEQUENCES]
    plan = make_plan([len(s) for s in sequences], max_residues=32, windows=windows, budget=1000)

    def pooled(pooling: Pooling) -> Any:
        options: Any = {"device": CPU, "dtype": torch.float32, "threads": 1}
        return Inference(TINY, tiny_weights, **options, pooling=pooling, layer=layer).pack(sequences, plan, 0)

    residues = pooled("residues")
    counted = plan.pool_end - plan.pool_begin
    assert residues.shape == (counted.sum(), 32)
    pieces = np.split(residues, np.cumsum(counted)[:-1])
    np.testing.assert_allclose(pooled("mean"), [piece.sum(axis=0) for piece in pieces], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(pooled("max"), [piece.max(axis=0) for piece in pieces])
    # no residue's vector is that of the token before it
    start = pooled("start")
    assert start.shape == (len(pieces), 32)
    assert min(np.abs(residues - row).max(axis=1).min() for row in start) > 1e-3
    if layer is None:
        tokens = np.array(
            [1, *Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32)._alphabet.encode(b"M"), 2]
        )
        expected = slow_encoder(TINY, tiny_weights, tokens)
        np.testing.assert_allclose(start[-1], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(pieces[-1][0], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_depend_on_the_plan_alone(
    tiny_weights: Weights, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "part_tokens", lambda width: 48)
    random = np.random.default_rng(3)
    sequences = [bytes(random.choice(list(b"ACDEFGHIKL"), length).tolist()) for length in random.integers(1, 33, 40)]
    plan = make_plan([len(s) for s in sequences], max_residues=32, windows=False, budget=200)
    one = Inference(TINY, tiny_weights, device=CPU, dtype=dtype, threads=1)
    three = Inference(TINY, tiny_weights, device=CPU, dtype=dtype, threads=3)
    numbers = range(len(plan.packs) - 1)
    expected = [one.pack(sequences, plan, number) for number in numbers]
    assert [len(rows) for rows in expected] == np.diff(plan.packs).tolist()
    for encoder in (one, three):
        for found, wanted in zip(encoder.packs(sequences, plan, numbers), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_order_of_proteins_does_not_matter(tiny_weights: Weights) -> None:
    encoder = Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1)
    means = []
    for sequences in (SEQUENCES, SEQUENCES[::-1]):
        plan = make_plan([len(s) for s in sequences], max_residues=32, windows=False, budget=25)
        sums = np.concatenate(list(encoder.packs(sequences, plan, range(len(plan.packs) - 1))))
        means.append({sequences[p]: row / len(sequences[p]) for p, row in zip(plan.protein, sums, strict=True)})
    for residues, mean in means[0].items():
        np.testing.assert_allclose(mean, means[1][residues], rtol=0, atol=1e-6)


def test_threads_share_no_product_and_the_caller_has_all(tiny_weights: Weights) -> None:
    encoder = Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=3)
    assert torch.get_num_threads() == 3
    assert {encoder._lanes.submit(torch.get_num_threads).result() for _ in range(9)} == {1}
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_a_caller_that_leaves_early_stops_what_is_not_begun(tiny_weights: Weights) -> None:
    encoder = Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1)
    plan = make_plan([len(s) for s in SEQUENCES], max_residues=32, windows=False, budget=12)
    packs = encoder.packs(SEQUENCES, plan, range(len(plan.packs) - 1))
    first = next(packs)
    packs.close()
    np.testing.assert_array_equal(encoder.pack(SEQUENCES, plan, 0), first)


def test_a_pack_that_does_not_fit_is_halved(tiny_weights: Weights, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan([len(s) for s in SEQUENCES], max_residues=32, windows=False, budget=1000)
    whole = Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1).pack(SEQUENCES, plan, 0)
    cramped = Cramped(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1)
    cramped.spans = []
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(cramped.pack(SEQUENCES, plan, 0), whole, rtol=1e-5, atol=1e-5)
        assert cramped.spans == [(0, 3), (3, 5), (5, 7)]
        warnings = ["out of memory on cpu, packs halved tokens=27", "out of memory on cpu, packs halved tokens=11"]
        assert caplog.messages == warnings
        # what follows is cut from the start
        np.testing.assert_allclose(cramped.pack(SEQUENCES, plan, 0), whole, rtol=1e-5, atol=1e-5)
    assert caplog.messages == warnings


def test_products_that_find_no_memory_are_halved_like_the_rest(
    tiny_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan([len(s) for s in SEQUENCES], max_residues=32, windows=False, budget=1000)
    inference = Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1)
    whole, compute = inference.pack(SEQUENCES, plan, 0), inference._compute
    errors = [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]

    def once(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return compute(*arguments)

    monkeypatch.setattr(inference, "_compute", once)
    np.testing.assert_allclose(inference.pack(SEQUENCES, plan, 0), whole, rtol=1e-5, atol=1e-5)
    errors.append(RuntimeError("another error"))
    with pytest.raises(RuntimeError, match="another error"):
        inference.pack(SEQUENCES, plan, 0)


def test_one_protein_that_does_not_fit_ends_the_run(tiny_weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Inference, "_compute", fail)
    plan = make_plan([10], max_residues=32, windows=False, budget=1000)
    with pytest.raises(MachineError, match="not enough memory for one protein of 10 residues"):
        Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1).pack([b"MKVLAAGIVG"], plan, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_cuda_gives_the_numbers_of_the_cpu(tiny_weights: Weights, dtype: torch.dtype, tolerance: float) -> None:
    plan = make_plan([len(s) for s in SEQUENCES], max_residues=32, windows=False, budget=1000)
    lengths = (plan.end - plan.begin)[:, None]
    means = [
        Inference(TINY, tiny_weights, device=device, dtype=kind, threads=1, pooling="ends").pack(SEQUENCES, plan, 0)
        / lengths
        for device, kind in ((CPU, torch.float32), (torch.device("cuda"), dtype))
    ]
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=tolerance)
