"""Tests of the ranges of proteins that workers take."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedbio.encoder.shards import plan_shards


@pytest.mark.parametrize(
    ("lengths", "shards", "expected"),
    [
        ([300, 100, 100, 100, 600], 3, [(0, 2), (2, 4), (4, 5)]),
        ([10, 10, 10, 10], 2, [(0, 2), (2, 4)]),
        ([10, 10], 1, [(0, 2)]),
        ([1, 1, 1, 1000], 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([1000, 1, 1, 1], 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([5, 5], 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
        ([], 2, [(0, 0), (0, 0)]),
        ([0, 0, 0], 2, [(0, 1), (1, 3)]),
    ],
)
def test_ranges_are_contiguous_and_none_is_empty_where_there_is_enough(
    lengths: list[int], shards: int, expected: list[tuple[int, int]]
) -> None:
    assert [(each.start, each.stop) for each in plan_shards(lengths, shards)] == expected


def test_ranges_exceed_an_equal_share_by_one_protein_at_most() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 2000, 5000)
    for shards in (2, 3, 7, 64):
        ranges = plan_shards(lengths, shards)
        assert list(itertools.chain(*ranges)) == list(range(5000))
        loads = [int(lengths[each.start : each.stop].sum()) for each in ranges]
        assert max(loads) <= lengths.sum() / shards + 2000


def test_no_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="0 shards"):
        plan_shards([1], 0)
