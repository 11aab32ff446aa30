"""Tests of the compact tables that tell what came before in a file of millions."""

from __future__ import annotations

import hashlib
import sys

import pytest

from fedbio.proteins.keys import KeyTable
from fedbio.proteins.protein import Protein
from fedbio.proteins.seen import Before, Seen


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def test_keys_are_numbered_in_the_order_in_which_they_come_first() -> None:
    table = KeyTable()
    numbers = [table.add(key(number % 5000)) for number in range(20_000)]  # grows three times
    assert numbers == [number % 5000 for number in range(20_000)]
    assert len(table) == 5000
    assert [table.find(key(number)) for number in (0, 4999, 5000)] == [0, 4999, -1]


def test_keys_of_one_slot_are_told_apart() -> None:
    table = KeyTable()
    keys = [bytes(8) + number.to_bytes(8, "little") for number in range(700)]  # the hash is all zero
    assert [table.add(each) for each in keys] == list(range(700))
    assert [table.find(each) for each in reversed(keys)] == list(reversed(range(700)))


def test_a_key_takes_little_memory() -> None:
    table = KeyTable()
    for number in range(100_000):
        table.add(key(number))
    held = sys.getsizeof(table._keys) + sys.getsizeof(table._slots)
    assert held / len(table) < 30


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        (Protein("a", "MKV", "Nucleus", "train", False), Before(1, True, True)),
        (Protein("a", "MKL", "Nucleus", "train", False), Before(1, False, True)),
        (Protein("a", "MKV", "Plastid", "train", False), Before(1, True, False)),
        (Protein("a", "MKV", "Nucleus", "test", False), Before(1, True, False)),
        (Protein("b", "MKV", "Nucleus", "train", False), None),
    ],
)
def test_an_id_that_comes_again_is_compared_with_the_first(again: Protein, expected: Before | None) -> None:
    seen = Seen()
    assert seen.add(Protein("a", "MKV", "Nucleus", "train", False), 1) is None
    assert seen.add(again, 5) == expected
    assert len(seen) == (1 if expected else 2)
