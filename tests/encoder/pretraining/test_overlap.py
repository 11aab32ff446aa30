"""Tests of overlaps between sequences, against plain searches in text."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.encoder.pretraining.overlap import WINDOW, Overlap


@pytest.mark.parametrize("letters", [b"ACDEFGHIKLMNPQRSTVWY", b"AC"])
def test_overlaps_are_those_of_a_plain_search(letters: bytes) -> None:
    random = np.random.default_rng(0)

    def draw(length: int) -> bytes:
        return random.choice(np.frombuffer(letters, np.uint8), length).tobytes()

    known = [draw(length) for length in (5, WINDOW - 1, WINDOW, WINDOW + 1, 30, 80, 81, 300)]
    long = [each for each in known if len(each) >= WINDOW]
    asked = [draw(length) for length in (1, WINDOW, 40, 200)] * 5
    for each in known:
        asked += [each, each[1:], each[:-1], b"M" + each, each + draw(3), draw(50) + each + draw(50), each[3:-4]]
        asked += [each[: len(each) // 2] + b"W" + each[len(each) // 2 + 1 :], each[:20] + draw(20)]
    asked += [long[-1][-20:] + long[-2][:20], (long[0] + long[1])[3:-3]]
    overlap = Overlap(known)
    found = {each: overlap.holds(each) for each in asked}
    assert found == {
        each: len(each) >= WINDOW and any(each in other or other in each for other in long) for each in asked
    }
    assert 10 < sum(found.values()) < len(found) - 10


def test_where_nothing_is_known_nothing_overlaps() -> None:
    assert not Overlap([]).holds(b"M" * 50)
    assert not Overlap([b"MK"]).holds(b"MK" * 50)
    assert not Overlap([b"M" * 50]).holds(b"")
