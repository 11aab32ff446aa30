"""Add to the next message what quantization lost of the last one."""

from __future__ import annotations

__all__ = ["ErrorFeedback"]

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbio.errors import FormatError
from fedbio.tensors.quantize import SEGMENT_VALUES, decode, encode
from fedbio.tensors.quantized import is_quantized


class ErrorFeedback:
    """Keep what quantization loses of each message, and add it to the next one.

    The errors then cancel over messages: the sum of what was received never differs from the sum of what was meant by
    more than one message's error. Meant for updates, which a receiver adds up, and for models in rounds in which each
    end goes on from what it received; where a message simply replaces the last one, it adds an old error to a new one.
    Seide et al. 2014 (1-bit stochastic gradient descent); Karimireddy et al. 2019 (Error feedback fixes SignSGD and
    other gradient compression schemes).

    Parameters
    ----------
    scheme : str
        One of `fedbio.tensors.SCHEMES`.

    Attributes
    ----------
    residual : dict of str to ndarray, float32
        What was lost of each quantized tensor; as large as those tensors. Keep it for as long as its stream of messages
        lasts, and one for each receiver that is sent something different.

    Examples
    --------
    >>> feedback = ErrorFeedback("fp4")
    >>> update = {"x": np.array([1.0, *[0.3] * 1023], np.float32)}
    >>> [round(float(feedback.compensate(update)["x"][1]), 3) for message in range(5)]  # arrive as 1/3, 1/4, 1/3, ...
    [0.3, 0.267, 0.317, 0.283, 0.333]
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.residual: dict[str, np.ndarray[Any, Any]] = {}

    def compensate(self, parameters: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Return what to quantize in place of `parameters`, and keep what that will lose.

        Each call stands for one message that is sent. Tensors that stay exact are passed through.

        Raises
        ------
        FormatError
            Naming a tensor that cannot be quantized, or whose shape is not that of the last message. Go on with a new
            `ErrorFeedback` after that.
        """
        compensated = {}
        for name, tensor in parameters.items():
            if is_quantized(tensor, self.scheme):
                tensor = self._add_residual(name, tensor)
                self.residual[name] = self._loss(name, tensor)
            compensated[name] = tensor
        return compensated

    def _add_residual(self, name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        residual = self.residual.get(name)
        if residual is None:
            return tensor
        if residual.shape != tensor.shape:
            raise FormatError(f"tensor {name!r}: shape {list(tensor.shape)}, last time {list(residual.shape)}")
        compensated: np.ndarray[Any, Any] = np.add(tensor, residual, dtype=tensor.dtype, casting="same_kind")
        return compensated

    def _loss(self, name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        flat = tensor.reshape(-1)
        lost = np.empty(flat.size, np.float32)
        for start in range(0, flat.size, SEGMENT_VALUES):
            segment = flat[start : start + SEGMENT_VALUES]
            try:
                received = decode(self.scheme, encode(self.scheme, segment).data, segment.size)
            except FormatError as error:
                raise FormatError(f"tensor {name!r}: {error}") from None
            lost[start : start + segment.size] = segment - received
        return lost.reshape(tensor.shape)
