"""Average models while they arrive: all sites' streams are pulled side by side, and the mean goes on at once.

No model is ever held, in memory or on disk: what is needed is each stream's last chunk and one chunk of the mean. A
site whose stream runs ahead waits, since nobody pulls. A mean is worth something only when the last chunk has been
taken without an error: whoever passes chunks on has to say so at the end.
"""

from __future__ import annotations

__all__ = ["SiteFault", "mean_chunks", "mean_size"]

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FedbioError, ProtocolError
from fedbio.tensors.check import CheckedReader, Manifest, check_values, is_finite
from fedbio.tensors.combine import MEAN_DTYPE, BlockMean, mean_manifest, shares
from fedbio.tensors.layout import CHUNK_BYTES, TensorLimits, manifest_header
from fedbio.tensors.reader import Piece

Chunk = bytes | bytearray | memoryview


class SiteFault(ProtocolError):
    """One site's stream cannot be part of the mean; `site` names it, so that the others may go on without it."""

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"{site}: {reason}")
        self.site, self.reason = site, reason


def mean_chunks(
    streams: Mapping[str, Iterable[Chunk]],
    weights: Mapping[str, float],
    manifest: Manifest,
    *,
    limits: TensorLimits | None = None,
) -> Iterator[memoryview]:
    """Yield the safetensors layout of the mean of models that arrive as streams: the bits of `weighted_mean`.

    Parameters
    ----------
    streams : mapping of str to iterable of bytes-like
        Each site's layout, plain or quantized, in chunks of any size; a chunk must stay as it is until the next one
        is asked for. An iterable may block until there is one, and may raise a `FedbioError` if there will be none.
    weights : mapping of str to float
        One for each stream.
    manifest : mapping of str to (shape, dtype)
        What each model must be, its tensors in this order.
    limits : TensorLimits, optional
        What to accept.

    Yields
    ------
    memoryview
        The mean's header first, then its data, float32, in chunks of 1 MiB; the last is shorter. Each chunk is
        memory of its own and may be kept.

    Raises
    ------
    SiteFault
        If a stream is malformed, is not what the manifest says, has a value that is not finite, or ends early.
    ProtocolError
        If a weight cannot be used, or the mean is too large for float32.
    """
    parts = shares(weights)
    if parts.keys() != streams.keys():
        raise ValueError("weights and streams are not of the same sites")
    sites = [_Site(name, streams[name], manifest, limits) for name in parts]
    # every header is looked at before anything is passed on
    for site in sites:
        site.open()
    head = memoryview(manifest_header(mean_manifest(manifest)))
    for begin in range(0, len(head), CHUNK_BYTES):
        yield head[begin : begin + CHUNK_BYTES]
    average = BlockMean(list(parts.values()))
    chunk = _new_chunk()
    filled = 0
    for name, (shape, _) in manifest.items():
        start, size = 0, math.prod(shape)
        while start < size:
            count = min(len(chunk) - filled, min(len(site.values) for site in sites))
            runs = [site.values[:count] for site in sites]
            mean = chunk[filled : filled + count]
            average(runs, mean)
            if not is_finite(mean):
                _blame(name, start, sites, runs)
            for site in sites:
                site.skip(count)
            start += count
            filled += count
            if filled == len(chunk):
                yield chunk.view(np.uint8).data
                chunk, filled = _new_chunk(), 0
    if filled:
        yield chunk[:filled].view(np.uint8).data


def mean_size(manifest: Manifest) -> int:
    """Return how many bytes `mean_chunks` yields in all."""
    mean = mean_manifest(manifest)
    return len(manifest_header(mean)) + sum(math.prod(shape) * dtype.itemsize for shape, dtype in mean.values())


def _new_chunk() -> NDArray[Any]:
    return np.empty(CHUNK_BYTES // MEAN_DTYPE.itemsize, MEAN_DTYPE)


def _blame(name: str, start: int, sites: list[_Site], runs: list[NDArray[Any]]) -> None:
    for site, run in zip(sites, runs, strict=True):
        try:
            check_values(name, start, run)
        except ProtocolError as error:
            raise SiteFault(site.name, str(error)) from None
    raise ProtocolError(f"tensor {name!r}: the mean is too large for {MEAN_DTYPE}")


class _Site:
    """One site's stream, and how far it has been used."""

    def __init__(self, name: str, stream: Iterable[Chunk], manifest: Manifest, limits: TensorLimits | None) -> None:
        self.name = name
        self._stream, self._manifest = stream, manifest
        # values that are not finite show in the mean: one look for all sites
        self._reader = CheckedReader(manifest, finite=False, limits=limits)
        self._pieces = self._read()
        self.values: NDArray[Any] = np.empty(0)
        """What has come and has not been used."""

    def open(self) -> None:
        """Pull the header, and the first values."""
        self.skip(0)
        names = [_filled(each) for each in (self._reader.specs or {}, self._manifest)]
        if names[0] != names[1]:
            raise SiteFault(self.name, "its tensors come in another order than the task's")

    def skip(self, count: int) -> None:
        """Go on after `count` values; if none is left pull more, after the last one the stream's end."""
        self.values = self.values[count:]
        if not len(self.values):
            self.values = self._pull()

    def _pull(self) -> NDArray[Any]:
        try:
            piece = next(self._pieces, None)
        except FedbioError as error:
            raise SiteFault(self.name, str(error)) from error
        return np.empty(0) if piece is None else piece.values

    def _read(self) -> Iterator[Piece]:
        for chunk in self._stream:
            yield from self._reader.feed(chunk)
        self._reader.finish()


def _filled(manifest: Manifest) -> list[str]:
    """Return the names of the tensors that have values, in their order."""
    return [name for name, (shape, _) in manifest.items() if math.prod(shape)]
