"""Tests of the choice of device and arithmetic, and of packs that do not fit into memory."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from fedbio.encoder.inference import Inference, choose_device, choose_dtype
from fedbio.encoder.packs import make_plan
from fedbio.errors import MachineError, SettingsError
from fedbio.weights import Weights

from .conftest import TINY

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


class Cramped(Inference):
    """Memory for three pieces, no more."""

    spans: list[tuple[int, int]]

    def _compute(self, sequences: Any, plan: Any, first: int, last: int) -> Any:
        if last - first > 3:
            raise torch.OutOfMemoryError
        self.spans.append((first, last))
        return super()._compute(sequences, plan, first, last)


SEQUENCES = [b"MKVLAAGIVG", b"LCAKAYWTPQ", b"DENRHFS", b"MKVLA", b"ACD", b"GHIKL", b"M"]


def test_a_pack_that_does_not_fit_is_halved(tiny_weights: Weights, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan([len(s) for s in SEQUENCES], max_residues=32, windows=False, budget=1000)
    whole = Inference(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1).pack(SEQUENCES, plan, 0)
    cramped = Cramped(TINY, tiny_weights, device=CPU, dtype=torch.float32, threads=1)
    cramped.spans = []
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(cramped.pack(SEQUENCES, plan, 0), whole, rtol=1e-5, atol=1e-5)
    assert cramped.spans == [(0, 3), (3, 5), (5, 7)]
    assert caplog.messages == [
        "out of memory on cpu, pack halved pieces=7",
        "out of memory on cpu, pack halved pieces=4",
    ]


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
        Inference(TINY, tiny_weights, device=device, dtype=kind, threads=1).pack(SEQUENCES, plan, 0) / lengths
        for device, kind in ((CPU, torch.float32), (torch.device("cuda"), dtype))
    ]
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=tolerance)
