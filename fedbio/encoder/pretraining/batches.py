"""Lay out an epoch: windows of long proteins, like lengths together, packs in a shuffled order, masks; all from a seed.

What a pack holds is a function of the seed, the corpus and the pack's place (epoch, stretch, number) alone. To go on
where a run was broken off, nothing but that place has to be known.
"""

from __future__ import annotations

__all__ = ["Batch", "Packs", "Place", "make_batch", "mean_pack_tokens", "pack_order", "windows_of"]

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.network import Runs
from fedbio.encoder.packs import ENDS
from fedbio.encoder.pretraining.corpus import Proteins
from fedbio.encoder.pretraining.masking import Masker

STRETCH = 1 << 19
"""Proteins that are sorted by length together: enough that most packs hold proteins of one length."""

ORDER, WINDOWS, SHUFFLE, MASKS = range(4)
"""Streams of random numbers that have nothing to do with each other."""


class Place(msgspec.Struct, frozen=True):
    """Where the next pack comes from: the epoch, the stretch of its proteins, and the pack of this stretch."""

    epoch: int = 0
    stretch: int = 0
    pack: int = 0


@dataclass(frozen=True)
class Batch:
    """A pack with masks, ready for the network.

    Parameters
    ----------
    tokens : Tensor, shape (T,), int64
        What the network sees.
    runs : sequence of (int, int)
        See `fedbio.encoder.network.Runs`.
    places, targets : Tensor, shape (M,), int64
        Where something is to be predicted, and what.
    """

    tokens: Tensor
    runs: Runs
    places: Tensor
    targets: Tensor

    def pinned(self) -> Batch:
        """Return the same in memory that a GPU copies from by itself."""
        return Batch(self.tokens.pin_memory(), self.runs, self.places.pin_memory(), self.targets.pin_memory())


def windows_of(
    lengths: NDArray[np.int64], max_residues: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose what is seen of each protein: all of it, or a random window of the longest that the model takes.

    Parameters
    ----------
    lengths : ndarray, shape (n,), int64
    max_residues : int
    random : numpy.random.Generator

    Returns
    -------
    begins, sizes : ndarray, shape (n,), int64

    Notes
    -----
    A window begins anywhere from half a window before the protein to half a window before its end, and is then moved
    inside: otherwise the ends, where sorting signals sit, would be seen hundreds of times less often than the middle.
    """
    sizes = np.minimum(lengths, max_residues)
    half = max_residues // 2
    begins = np.floor(random.random(len(lengths)) * (lengths + 1)).astype(np.int64) - half
    return np.clip(begins, 0, lengths - sizes), sizes


def pack_order(sizes: NDArray[np.int64], budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort by length and cut into packs of at most `budget` tokens.

    Returns
    -------
    order : ndarray, shape (n,), int64
        Places in `sizes`, by length; equal lengths stay in their order.
    borders : ndarray, shape (packs + 1,), int64
        Pack k holds ``order[borders[k]:borders[k + 1]]``.
    """
    order = np.argsort(sizes, kind="stable")
    ends = np.cumsum(sizes[order] + ENDS)
    borders = [0]
    while borders[-1] < len(order):
        begun = ends[borders[-1] - 1] if borders[-1] else 0
        # a piece that is longer than the budget is a pack of its own
        borders.append(max(borders[-1] + 1, int(np.searchsorted(ends, begun + budget, side="right"))))
    return order, np.array(borders, dtype=np.int64)


def mean_pack_tokens(proteins: Proteins, max_residues: int, budget: int) -> float:
    """How full packs are on average, in tokens; the same in each epoch but for the borders of stretches."""
    sizes = np.minimum(np.diff(proteins.ends), max_residues)
    packs = sum(
        len(pack_order(sizes[first : first + STRETCH], budget)[1]) - 1 for first in range(0, len(sizes), STRETCH)
    )
    return float((sizes + ENDS).sum()) / packs


class Packs:
    """The packs of a corpus without end, from any place on.

    Parameters
    ----------
    proteins : Proteins
    alphabet : str
    masker : Masker
    max_residues : int
        Longest piece.
    budget : int
        The most tokens in a pack.
    seed : int
    """

    def __init__(
        self, proteins: Proteins, *, alphabet: str, masker: Masker, max_residues: int, budget: int, seed: int
    ) -> None:
        self._proteins, self._alphabet, self._masker = proteins, alphabet, masker
        self._max_residues, self._budget, self._seed = max_residues, budget, seed

    def places(self, place: Place) -> Iterator[tuple[Place, Place, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each pack's place, the place after it, and its pieces: first residues in the corpus, and sizes."""
        epoch, stretch, first = place.epoch, place.stretch, place.pack
        count = len(self._proteins)
        stretches = -(-count // STRETCH)
        while True:
            order = self._random(ORDER, epoch).permutation(count)
            while stretch < stretches:
                chosen = order[stretch * STRETCH : (stretch + 1) * STRETCH]
                begins, sizes = windows_of(
                    self._proteins.ends[chosen + 1] - self._proteins.ends[chosen],
                    self._max_residues,
                    self._random(WINDOWS, epoch, stretch),
                )
                begins += self._proteins.ends[chosen]
                by_length, borders = pack_order(sizes, self._budget)
                shuffled = self._random(SHUFFLE, epoch, stretch).permutation(len(borders) - 1)
                for number in range(first, len(shuffled)):
                    pieces = by_length[borders[shuffled[number]] : borders[shuffled[number] + 1]]
                    here, after = Place(epoch, stretch, number), Place(epoch, stretch, number + 1)
                    yield here, after, begins[pieces], sizes[pieces]
                stretch, first = stretch + 1, 0
            epoch, stretch = epoch + 1, 0

    def batch(self, place: Place, begins: NDArray[np.int64], sizes: NDArray[np.int64]) -> Batch:
        """Make the pack of a place ready for the network."""
        random = self._random(MASKS, place.epoch, place.stretch, place.pack)
        return make_batch(self._proteins.residues, begins, sizes, self._alphabet, self._masker, random)

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *stream])))


def make_batch(
    residues: NDArray[np.uint8],
    begins: NDArray[np.int64] | Sequence[int],
    sizes: NDArray[np.int64] | Sequence[int],
    alphabet: str,
    masker: Masker,
    random: np.random.Generator,
) -> Batch:
    """Lay pieces of proteins end to end, each between start and end token, and mask.

    Parameters
    ----------
    residues : ndarray, uint8
        Letters in ASCII.
    begins, sizes : sequence of int
        Each piece's first residue and length; pieces of one length are neighbours.
    alphabet : str
    masker : Masker
    random : numpy.random.Generator
    """
    known = ALPHABETS[alphabet]
    lengths = np.asarray(sizes) + ENDS
    stops = np.cumsum(lengths)
    tokens = np.empty(int(stops[-1]), dtype=np.uint8)
    tokens[stops - lengths], tokens[stops - 1] = known.start, known.end
    for begin, size, stop in zip(np.asarray(begins).tolist(), np.asarray(sizes).tolist(), stops.tolist(), strict=True):
        tokens[stop - 1 - size : stop - 1] = residues[begin : begin + size]
    inside = np.ones(len(tokens), dtype=bool)
    inside[stops - lengths] = inside[stops - 1] = False
    tokens[inside] = known.encode(tokens[inside].tobytes())
    seen, places = masker(tokens, random)
    changes = np.flatnonzero(np.diff(lengths, prepend=0))
    counts = np.diff(changes, append=len(lengths))
    return Batch(
        torch.from_numpy(seen.astype(np.int64)),
        list(zip(counts.tolist(), lengths[changes].tolist(), strict=True)),
        torch.from_numpy(places),
        torch.from_numpy(tokens[places].astype(np.int64)),
    )
