"""Tests of linear maps in each arithmetic, with oneDNN and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedbio.encoder import linear
from fedbio.encoder.linear import make_linear
from fedbio.errors import MachineError

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(40, 32, generator=RANDOM)
WEIGHT = torch.randn(48, 32, generator=RANDOM) / 8
BIAS = torch.randn(48, generator=RANDOM)
EXACT = F.linear(X.double(), WEIGHT.double(), BIAS.double())
EXPECTED = {None: EXACT, "gelu": F.gelu(EXACT), "gelu_tanh": F.gelu(EXACT, approximate="tanh")}


class Nothing:
    """A room of torch.ops in a build without oneDNN."""


def relative_error(found: Tensor, activation: str | None) -> float:
    expected = EXPECTED[activation]
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "without"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_results_are_exact_up_to_rounding(
    activation: str | None, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        y = make_linear(WEIGHT, BIAS, dtype=dtype, activation=activation)(X)
        assert y.dtype == dtype
        assert relative_error(y, activation) < tolerance


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_bytes_are_as_exact_as_bytes_can_be(activation: str | None) -> None:
    y = make_linear(WEIGHT, BIAS, dtype=torch.float32, int8=True, activation=activation)(X)
    assert y.dtype == torch.float32
    assert relative_error(y, activation) < 0.02
    zero = make_linear(WEIGHT, BIAS, dtype=torch.float32, int8=True)(torch.zeros(3, 32))
    torch.testing.assert_close(zero, BIAS.expand(3, -1))


def test_a_torch_without_bytes_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "onednn", Nothing())
    with pytest.raises(MachineError, match="dtype 'int8': this build of torch does not have it; use bfloat16"):
        linear.make_linear(WEIGHT, BIAS, dtype=torch.float32, int8=True)
