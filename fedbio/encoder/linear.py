"""Linear maps in the arithmetic that inference computes in: float32, bfloat16, or bytes."""

from __future__ import annotations

__all__ = ["Int8Linear", "use_arithmetic"]

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear map whose weights and inputs are rounded to bytes, each row with a scale of its own.

    Parameters
    ----------
    linear : nn.Linear
        Its weights are rounded once, one scale for each output.
    dtype : torch.dtype
        Of what goes in and comes out.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1).clamp_min(1e-12) / 127  # (out,)
        self.dtype = dtype
        self.scale = scale
        self.bias = linear.bias
        self.weight = (linear.weight / scale[:, None]).round().to(torch.int8).t()  # (in, out)

    def forward(self, x: Tensor) -> Tensor:  # (T, in) -> (T, out)
        scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / 127  # (T, 1)
        rounded = (x / scale).round_().to(torch.int8)
        product = torch._int_mm(rounded, self.weight).float()  # (T, out)
        return torch.addcmul(self.bias, product.mul_(scale), self.scale).to(self.dtype)


def use_arithmetic(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make every linear map of a network compute in `dtype`; with int8, bytes and the best of the others."""
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                if dtype == torch.int8:
                    able = torch.cpu.get_capabilities()
                    other = torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
                    setattr(parent, name, Int8Linear(module, other))
                else:
                    module.to(dtype)
    return network
