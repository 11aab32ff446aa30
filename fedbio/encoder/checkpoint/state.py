"""Take tensors out of someone's checkpoint one by one, each checked before memory is taken for it."""

from __future__ import annotations

__all__ = ["State", "make_config"]

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from fedbio.errors import FormatError
from fedbio.weights import EncoderConfig

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def make_config(where: str, **fields: Any) -> EncoderConfig:
    """Make an architecture from what a file says, each number within its bounds.

    Raises
    ------
    FormatError
        Naming the number that is out of bounds.
    """
    try:
        return msgspec.convert(fields, EncoderConfig)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where}: an architecture that cannot be: {error}") from error


class State:
    """The tensors of a checkpoint by their names there.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Without a prefix that all of them share.
    where : str
        The file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Any], where: str) -> None:
        self._tensors, self.where = tensors, where
        self._taken: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def rows(self, name: str) -> int:
        """Return the first dimension of a matrix."""
        shape = self._get(name).shape
        if len(shape) != 2:
            raise FormatError(f"{self.where}: tensor {name!r}: expected a matrix, found shape {list(shape)}")
        return int(shape[0])

    def take(self, name: str, shape: tuple[int, ...], into: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return a copy of a tensor in float32.

        Parameters
        ----------
        name : str
        shape : tuple of int
            What the architecture wants.
        into : ndarray, float32, optional
            Of this shape: filled and returned instead of new memory.

        Raises
        ------
        FormatError
            If it is missing, of another shape, no floating-point numbers, or not finite.
        """
        tensor = self._get(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES:
            raise FormatError(
                f"{self.where}: tensor {name!r}: expected floating-point numbers of shape {list(shape)}, "
                f"found {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}; "
                "the file and its configuration are not of one encoder"
            )
        # a view may repeat a few stored numbers endlessly; copied out it would fill the memory
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FormatError(f"{self.where}: tensor {name!r}: its shape claims more numbers than are stored")
        array = np.empty(shape, np.float32) if into is None else into
        torch.from_numpy(array).copy_(tensor)
        if not np.isfinite(array).all():
            raise FormatError(f"{self.where}: tensor {name!r}: holds infinite or undefined numbers; get a fresh copy")
        self._taken.add(name)
        return array

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same numbers; the first counts as taken."""
        self._taken.add(one)
        return bool(torch.equal(self._get(one), self._get(other)))

    def finish(self, passed_over: str) -> None:
        """Refuse tensors that nobody has asked for: with them the encoder would be another one.

        Parameters
        ----------
        passed_over : str
            Regular expression of names that make no difference to hidden states.

        Raises
        ------
        FormatError
            Naming the first one.
        """
        for name in self._tensors:
            if name not in self._taken and not re.match(passed_over, name):
                raise FormatError(
                    f"{self.where}: tensor {name!r} is not part of an encoder of this kind; "
                    "merge adapters into the weights before, or give the original checkpoint"
                )

    def _get(self, name: str) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise FormatError(f"{self.where}: tensor {name!r} is missing; was the file copied completely?")
        return tensor
