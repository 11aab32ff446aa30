"""Average model files into a new one, run by run: memory does not grow with the model."""

from __future__ import annotations

__all__ = ["average_files"]

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import ProtocolError
from fedbio.files import whole_file
from fedbio.tensors.check import Manifest, check_manifest, check_values, is_finite
from fedbio.tensors.combine import MEAN_DTYPE, BlockMean, mean_manifest, shares
from fedbio.tensors.layout import TensorLimits, manifest_header
from fedbio.tensors.source import RUN_VALUES, TensorFile


def average_files(
    parts: Sequence[tuple[str, str | os.PathLike[str], float]],
    destination: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    differences: bool = False,
    expected: Manifest | None = None,
    limits: TensorLimits | None = None,
) -> None:
    """Average safetensors files tensor by tensor: the bits of `fedbio.tensors.weighted_mean`, in a few MiB.

    Parameters
    ----------
    parts : sequence of (name, path, weight)
        Sorted by name before anything is added. The files are read once, and the kernel may forget them after that.
    destination : path-like
        Gets the mean, float32; it appears whole or not at all.
    base : path-like, optional
        A model in whose place the mean comes: its tensors that are not in the parts are copied as they are, and the
        order is its own. Without it the order is that of the first part.
    differences : bool
        Whether the parts are what is added to the base.
    expected : mapping of str to (shape, dtype), optional
        What each part must be; by default they must only agree with each other.

    Raises
    ------
    ProtocolError
        If a part is not what is expected or has a value that is not finite; names the part and the tensor.
    FormatError
        If a file is malformed.
    """
    if not parts:
        raise ValueError("there is no model to average")
    if differences and base is None:
        raise ValueError("differences have to be added to something")
    ordered = shares({name: weight for name, _, weight in parts})
    if len(ordered) < len(parts):
        raise ValueError("two models have one name")
    paths = {name: path for name, path, _ in parts}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(TensorFile(paths[name], limits=limits)) for name in ordered}
        model = None if base is None else stack.enter_context(TensorFile(base, limits=limits))
        wanted = expected or next(iter(files.values())).manifest
        for name, file in files.items():
            check_manifest(file.manifest, wanted, source=name)
        layout = mean_manifest(wanted) if model is None else _laid_over(model, wanted, differences=differences)
        beside = stack.enter_context(whole_file(destination))
        output = stack.enter_context(open(beside, "wb"))
        output.write(manifest_header(layout))
        mean = _Mean(ordered, files, model if differences else None)
        for name, (shape, dtype) in layout.items():
            if name in wanted:
                mean.write(name, shape, wanted[name][1], output)
            elif model is not None:
                _copy(model, name, math.prod(shape), dtype, output)


def _laid_over(base: TensorFile, parts: Manifest, *, differences: bool) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return what the base becomes once means have come in the place of some of its tensors."""
    for name, (shape, _) in parts.items():
        found = base.manifest.get(name)
        if found is None or found[0] != shape:
            here = "is not in the model" if found is None else f"is {list(found[0])} in the model"
            raise ProtocolError(f"tensor {name!r} of shape {list(shape)} {here} that it belongs to")
    layout = dict(base.manifest)
    for name, (shape, dtype) in base.manifest.items():
        if name in parts:
            layout[name] = (shape, np.result_type(dtype, MEAN_DTYPE) if differences else MEAN_DTYPE)
    return layout


class _Mean:
    """Reads a run of every file, averages it, and writes it; the buffers are made once."""

    def __init__(self, parts: Mapping[str, float], files: Mapping[str, TensorFile], base: TensorFile | None) -> None:
        self._files, self._base = files, base
        self._average = BlockMean(list(parts.values()))
        self._runs = [_buffer() for _ in files]
        self._mean, self._based = np.empty(RUN_VALUES, MEAN_DTYPE), _buffer()

    def write(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], output: BinaryIO) -> None:
        """Write the mean of one tensor, whose dtype in the parts is `dtype`."""
        size = math.prod(shape)
        for start in range(0, size, RUN_VALUES):
            count = min(RUN_VALUES, size - start)
            runs = [buffer.view(dtype)[:count] for buffer in self._runs]
            for file, run in zip(self._files.values(), runs, strict=True):
                file.read(name, start, run)
            values: NDArray[Any] = self._mean[:count]
            self._average(runs, values)
            if not is_finite(values):
                self._blame(name, start, runs)
            if self._base is not None:
                values = self._added(self._base, name, start, values)
            output.write(values.data)
        for file in self._files.values():
            file.release(name, size)

    def _blame(self, name: str, start: int, runs: Sequence[NDArray[Any]]) -> None:
        for site, run in zip(self._files, runs, strict=True):
            check_values(name, start, run, source=site)
        raise ProtocolError(f"tensor {name!r}: the mean is too large for {MEAN_DTYPE}")

    def _added(self, base: TensorFile, name: str, start: int, change: NDArray[Any]) -> NDArray[Any]:
        run = self._based.view(base.manifest[name][1])[: len(change)]
        base.read(name, start, run)
        based: NDArray[Any] = run + change
        return based


def _copy(base: TensorFile, name: str, size: int, dtype: np.dtype[Any], output: BinaryIO) -> None:
    buffer = _buffer().view(dtype)
    for start in range(0, size, RUN_VALUES):
        run = buffer[: min(RUN_VALUES, size - start)]
        base.read(name, start, run)
        output.write(run.data)


def _buffer() -> NDArray[np.uint8]:
    """Return room for a run of the widest dtype; memory that is never touched is never taken."""
    return np.empty(RUN_VALUES * 8, np.uint8)
