"""Embeddings of residues that stay in their files until a batch needs them."""

from __future__ import annotations

__all__ = ["Features", "Residues", "join"]

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError

if TYPE_CHECKING:
    from fedbio.classifier.standardize import Standardizer
    from fedbio.embeddings import Embeddings


@dataclass(frozen=True)
class Residues:
    """The embeddings of the residues of n proteins, in open files.

    Parameters
    ----------
    stores : tuple of Embeddings
        Open files with one row per residue.
    spans : ndarray, shape (n, 3), int64
        Number of each protein's store, its first row there, and the row after its last.
    most : int or None
        Of a protein with more residues than that, the first and the last half of so many are read: sorting signals sit
        at the ends. None reads all.
    standardizer : Standardizer or None
        Applied to what is read.
    """

    stores: tuple[Embeddings, ...]
    spans: NDArray[np.int64]
    most: int | None
    standardizer: Standardizer | None = None

    @classmethod
    def of(cls, store: Embeddings, ids: Sequence[str], *, most: int | None) -> Residues:
        """Look up some proteins of a file.

        Raises
        ------
        DataError
            If the file lacks one or its residues, or has one row per protein.
        """
        spans = store.spans(ids)
        for place in np.flatnonzero(spans[:, 0] == spans[:, 1])[:1].tolist():
            raise DataError(f"{store.path}: record {ids[place]!r} has no residues; embed the proteins again")
        return cls((store,), np.insert(spans, 0, 0, axis=1), most)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of proteins, and width of an embedding."""
        return len(self.spans), self.stores[0].info.width

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, places: Sequence[int] | NDArray[np.int64] | slice) -> Residues:
        """Return some of the proteins."""
        where = places if isinstance(places, slice) else np.asarray(places, dtype=np.int64)
        return replace(self, spans=self.spans[where])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues that are read of each protein, shape (n,)."""
        lengths: NDArray[np.int64] = self.spans[:, 2] - self.spans[:, 1]
        return lengths if self.most is None else np.minimum(lengths, self.most)

    def read(self, places: NDArray[np.int64], into: NDArray[np.float32], *, gap: int) -> None:
        """Read proteins one after the other, and leave `gap` rows before, between and after them as they are.

        Parameters
        ----------
        places : ndarray, shape (B,), int64
        into : ndarray, shape (sum of their lengths + (B + 1) gap, D), float32
        gap : int
        """
        first = gap
        for place, length in zip(places.tolist(), self.lengths[places].tolist(), strict=True):
            self._read(place, into[first : first + length])
            first += length + gap

    def each(self) -> Iterator[NDArray[np.float32]]:
        """Yield the embeddings of one protein after the other, shape (residues, D)."""
        for place, length in enumerate(self.lengths.tolist()):
            rows = np.empty((length, self.shape[1]), dtype=np.float32)
            self._read(place, rows)
            yield rows

    def means(self) -> NDArray[np.float32]:
        """Return the mean over the residues of each protein, shape (n, D)."""
        means = [rows.mean(axis=0, dtype=np.float64).astype(np.float32) for rows in self.each()]
        return np.array(means, dtype=np.float32).reshape(self.shape)

    def _read(self, place: int, into: NDArray[np.float32]) -> None:
        number, first, last = self.spans[place].tolist()
        store = self.stores[number]
        if len(into) == last - first:
            into[:] = store.span(first, last)
        else:
            head = (len(into) + 1) // 2
            into[:head] = store.span(first, first + head)
            into[head:] = store.span(last - (len(into) - head), last)
        if self.standardizer is not None:
            into -= self.standardizer.mean
            into /= self.standardizer.scale


Features = NDArray[np.float32] | Residues
"""One row per protein, shape (n, D), or the residues of n proteins."""


def join(parts: Sequence[Features]) -> Features:
    """Put the features of several parties together, all of one kind, in their order."""
    residues = [part for part in parts if isinstance(part, Residues)]
    if not residues:
        return np.concatenate([part for part in parts if not isinstance(part, Residues)])
    stores: list[Embeddings] = []
    spans = []
    for each in residues:
        spans.append(each.spans + np.array([len(stores), 0, 0]))
        stores += each.stores
    return replace(residues[0], stores=tuple(stores), spans=np.concatenate(spans))
