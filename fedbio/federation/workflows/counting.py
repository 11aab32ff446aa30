"""What the task of counting proteins says: the words that server and sites share."""

from __future__ import annotations

__all__ = ["COUNT", "SPLITS", "CountSpec", "Counted"]

import itertools

import msgspec

from fedbio.errors import ProtocolError

COUNT = "count"
"""Name of the task."""

SPLITS = ("train", "validation", "test")

MAX_CELLS = 100_000
"""Classes or bins of one job; more is no table for people."""

MAX_COUNT = 1 << 53
"""A count above it is no count of proteins, and no exact number in most programs that read JSON."""

Cells = list[int | None]
"""Counts of a table; None where one was held back."""


class CountSpec(msgspec.Struct, frozen=True):
    """What is counted.

    Parameters
    ----------
    classes : tuple of str
    length_bins : tuple of int
        Upper ends of the bins, in residues, ascending; one more bin takes what is longer.
    min_count : int
        No count below it leaves a site.
    """

    classes: tuple[str, ...]
    length_bins: tuple[int, ...]
    min_count: int

    def check(self) -> None:
        """Refuse what cannot be counted.

        Raises
        ------
        ProtocolError
        """
        bins = self.length_bins
        if not 1 <= len(bins) <= MAX_CELLS or not len(self.classes) <= MAX_CELLS:
            raise ProtocolError(f"{len(self.classes)} classes and {len(bins)} bins; at most {MAX_CELLS} can be counted")
        if bins[0] < 1 or any(low >= high for low, high in itertools.pairwise(bins)) or self.min_count < 1:
            raise ProtocolError("length_bins must ascend from 1 or more, and min_count must be 1 or more")


class Counted(msgspec.Struct, frozen=True):
    """A site's counts.

    Parameters
    ----------
    classes : list of list of int or None
        A row for each class, and a last one for proteins without a label; in each, training, validation and test.
    lengths : list of int or None
        A number for each bin, and one for what is longer.
    min_count : int
        What the site has held back below: the job's minimum or its own, whichever is higher.
    """

    classes: list[Cells]
    lengths: Cells
    min_count: int = 0

    def check(self, spec: CountSpec) -> None:
        """Refuse tables of another form, or with a count that should have been held back.

        Raises
        ------
        ProtocolError
        """
        if [len(row) for row in self.classes] != [len(SPLITS)] * (len(spec.classes) + 1):
            raise ProtocolError(f"expected counts of {len(spec.classes) + 1} rows by {len(SPLITS)} splits")
        if len(self.lengths) != len(spec.length_bins) + 1:
            raise ProtocolError(f"expected counts of {len(spec.length_bins) + 1} bins, found {len(self.lengths)}")
        for count in itertools.chain(self.lengths, *self.classes):
            if count is not None and not spec.min_count <= count <= MAX_COUNT:
                raise ProtocolError(f"a count of {count}; expected {spec.min_count} or more, or none")

    @property
    def held_back(self) -> tuple[int, int]:
        """How many cells of the two tables were held back."""
        return sum(row.count(None) for row in self.classes), self.lengths.count(None)
