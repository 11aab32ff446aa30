"""Linear maps on a CPU in the arithmetic that inference computes in: float32, bfloat16, or bytes.

oneDNN does them where torch was built with it. The operations are not documented, so the plain ones stand by.
"""

from __future__ import annotations

__all__ = ["Linear", "make_linear"]

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedbio.encoder.network import gelu_tanh
from fedbio.errors import MachineError

Linear = Callable[[Tensor], Tensor]
"""A linear map and what follows it: (T, in) of any floating type -> (T, out) of its own."""

_ACTIVATIONS: dict[str, Linear] = {"gelu_tanh": gelu_tanh, "gelu": F.gelu}
_AFTER: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "gelu_tanh": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
}
_TYPICAL_ROWS = 512


def make_linear(
    weight: Tensor, bias: Tensor, *, dtype: torch.dtype, int8: bool = False, activation: str | None = None
) -> Linear:
    """Prepare a linear map for many calls.

    Parameters
    ----------
    weight : Tensor, shape (out, in), float32
    bias : Tensor, shape (out,), float32
    dtype : torch.dtype
        Of the result, and of the arithmetic unless it is int8.
    int8 : bool
        Multiply bytes.
    activation : {"gelu_tanh", "gelu"}, optional
        What is applied to the result.

    Raises
    ------
    MachineError
        If bytes are asked for and this build of torch does not multiply them.
    """
    if int8:
        return _bytes(weight, bias, dtype, activation)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return _packed(weight, bias, activation)
    return _plain(weight, bias, activation)


def _packed(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    """Faster than torch's own: in float32 where the processor is not Intel's, and GELU before the sums are stored."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    after = _AFTER[activation]

    def linear(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), packed, bias, *after)
        return y

    return linear


def _plain(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    after = _ACTIVATIONS[activation] if activation else torch.Tensor.contiguous
    return lambda x: after(F.linear(x.to(weight.dtype), weight, bias))


def _bytes(weight: Tensor, bias: Tensor, dtype: torch.dtype, activation: str | None) -> Linear:
    """Weights rounded with a scale for each output, inputs with one scale for all rows at hand."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise MachineError("dtype 'int8': this build of torch does not have it; use bfloat16 or float32")
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127  # (out,)
    packed = torch.ops.onednn.qlinear_prepack((weight / scales[:, None]).round().to(torch.int8), None)
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    after = _AFTER[activation]

    def linear(x: Tensor) -> Tensor:
        least, most = x.aminmax()
        scale = max(-float(least), float(most), 1e-12) / 127
        rounded = (x * (1 / scale)).round_().to(torch.int8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, scale, 0, packed, scales, zeros, bias, 1.0, 0, dtype, *after
        )
        return y

    return linear
