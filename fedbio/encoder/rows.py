"""Put the rows of the finished file together: means from the sums of pieces, and rows from an earlier file."""

from __future__ import annotations

__all__ = ["Assembly", "KnownRows"]

from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import CHUNK_ROWS, Embeddings, EmbeddingsWriter, check_same_encoder
from fedbio.encoder.packs import Plan
from fedbio.encoder.setup import StrPath
from fedbio.results import EncoderInfo


class KnownRows:
    """Rows of an earlier embeddings file by the digest of their sequence; empty without a file.

    Raises
    ------
    DataError
        If the file was made with another encoder.
    """

    def __init__(self, path: StrPath | None, info: EncoderInfo) -> None:
        self.places: dict[bytes, int] = {}
        self._file: Embeddings | None = None
        if path is not None:
            self._file = Embeddings.open(path)
            remedy = "give the encoder that made it, or do without reusing it"
            check_same_encoder(self._file.info, info, where=str(path), remedy=remedy)
            self.places = {digest.tobytes(): place for place, digest in enumerate(self._file.digests)}

    def __enter__(self) -> KnownRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, digests: Sequence[bytes]) -> NDArray[np.float32]:
        """Return the rows of some sequences that `places` has, shape (len(digests), d)."""
        assert self._file is not None
        return self._file.take(np.array([self.places[digest] for digest in digests], dtype=np.int64))


class Assembly:
    """Rows for sequences by their digests.

    Parameters
    ----------
    fresh : sequence of bytes
        Digests of the proteins that `plan` speaks of, in its order.
    plan : Plan
    sums : EmbeddingsWriter
        Holds one row for each piece of the plan.
    known : KnownRows
        Has all others.
    """

    def __init__(self, fresh: Sequence[bytes], plan: Plan, sums: EmbeddingsWriter, known: KnownRows) -> None:
        self._known, self._sums = known, sums
        self._numbers = {digest: number for number, digest in enumerate(fresh)}
        # pieces of one protein side by side, in the order of their residues
        self._order = np.lexsort((plan.begin, plan.protein))
        self._firsts = np.searchsorted(plan.protein[self._order], np.arange(len(fresh) + 1))
        self._residues = np.bincount(
            plan.protein, weights=plan.pool_end - plan.pool_begin, minlength=len(fresh)
        ).astype(np.float32)

    def blocks(self, digests: Sequence[bytes]) -> Iterator[NDArray[np.float32]]:
        """Yield the rows of sequences in order, `CHUNK_ROWS` at a time."""
        for first in range(0, len(digests), CHUNK_ROWS):
            yield self._block(digests[first : first + CHUNK_ROWS])

    def _block(self, digests: Sequence[bytes]) -> NDArray[np.float32]:
        numbers = np.array([self._numbers.get(digest, -1) for digest in digests], dtype=np.int64)
        fresh, old = np.flatnonzero(numbers >= 0), np.flatnonzero(numbers < 0)
        if not len(old):
            return self._means(numbers)
        known = self._known.take([digests[row] for row in old.tolist()])
        if not len(fresh):
            return known
        block = np.empty((len(digests), known.shape[1]), dtype=np.float32)
        block[old] = known
        block[fresh] = self._means(numbers[fresh])
        return block

    def _means(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        firsts = self._firsts[numbers]
        counts = self._firsts[numbers + 1] - firsts
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        sums = self._sums.take(self._order[np.repeat(firsts, counts) + within])  # (pieces, d)
        totals: NDArray[np.float32] = np.add.reduceat(sums, starts, axis=0)  # (proteins, d)
        totals /= self._residues[numbers][:, None]
        return totals
