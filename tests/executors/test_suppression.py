"""What can be found out of a table with counts held back, by trying every table that it may have been."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from fedbio.executors.suppression import suppress

LEAST = 3


def tables(cells: int, total: int, most: int) -> Iterator[dict[int, int]]:
    """Yield every table of so many cells with this total."""
    for counts in itertools.product(range(most + 1), repeat=cells - 1):
        last = total - sum(counts)
        if 0 <= last <= most:
            yield dict(enumerate((*counts, last)))


def drawn(number: int) -> dict[int, int]:
    """Return a table of four cells, small and large counts in it."""
    return dict(enumerate(np.random.default_rng(number).choice([0, 1, 2, 3, 4, 6, 9, 12], size=4).tolist()))


TABLES = [drawn(number) for number in range(60)]
TOLD = [each for each in TABLES if any(count is not None for count in suppress(each, LEAST).values())]


def test_there_are_tables_of_every_kind() -> None:
    hidden = [sum(count is None for count in suppress(each, LEAST).values()) for each in TABLES]
    assert {0, 2, 3, 4} <= set(hidden)


@pytest.mark.parametrize("counts", TABLES, ids=str)
def test_no_small_count_is_told_and_what_is_told_is_true(counts: dict[int, int]) -> None:
    for cell, told in suppress(counts, LEAST).items():
        assert told is None or told == counts[cell] >= LEAST


@pytest.mark.parametrize("counts", TOLD, ids=str)
def test_small_counts_may_be_anything_to_one_who_knows_the_total(counts: dict[int, int]) -> None:
    told = suppress(counts, LEAST)
    small = [cell for cell, count in counts.items() if count < LEAST]
    total = sum(counts.values())
    possible = {
        tuple(other[cell] for cell in small)
        for other in tables(len(counts), total, total)
        # what is told fits, small ones are small, and the others are not
        if all(value is None or other[cell] == value for cell, value in told.items())
        and all((other[cell] < LEAST) == (cell in small) for cell in other)
    }
    assert possible == set(itertools.product(range(LEAST), repeat=len(small)))


@pytest.mark.parametrize("counts", TOLD, ids=str)
def test_one_who_knows_the_rule_too_cannot_tell_that_a_small_count_is_not_zero(counts: dict[int, int]) -> None:
    told, total = suppress(counts, LEAST), sum(counts.values())
    small = [cell for cell, count in counts.items() if count < LEAST]
    possible = {
        tuple(other[cell] for cell in small)
        for other in tables(len(counts), total, total)
        if suppress(other, LEAST) == told
    }
    below = {
        each
        for each in itertools.product(range(LEAST), repeat=len(small))
        if sum(each) <= sum(counts[c] for c in small)
    }
    assert below <= possible


def test_nothing_is_held_back_without_need() -> None:
    assert suppress({"a": 3, "b": 4}, 3) == {"a": 3, "b": 4}
    # one small count, and one other hides it
    assert sorted(suppress({"a": 2, "b": 50, "c": 60, "d": 70}, 3).values(), key=str).count(None) == 2


def test_a_single_pair_is_held_back_whole() -> None:
    assert suppress({"a": 1, "b": 3}, 3) == {"a": None, "b": None}


def test_other_sites_hold_other_counts_back_and_each_always_the_same() -> None:
    counts = {"small": 0, **{f"cell {number}": 100 for number in range(8)}}
    hidden = set()
    for site in range(20):
        told = suppress(counts, 5, salt=f"site-{site}")
        hidden |= {cell for cell, count in told.items() if count is None}
    # whatever hides it: not one and the same count everywhere, which would be missing from every sum
    assert len(hidden) > 5
    assert suppress(counts, 5, salt="a") == suppress(dict(reversed(counts.items())), 5, salt="a")
