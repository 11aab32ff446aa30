"""Tests of the plan: pieces, windows, packs."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.encoder.packs import count_pieces, make_plan


def test_packs_hold_like_lengths_within_the_budget() -> None:
    plan = make_plan([3, 10, 4, 10, 3], max_residues=10, windows=False, budget=20)
    assert plan.protein.tolist() == [1, 3, 2, 0, 4]
    assert plan.packs.tolist() == [0, 1, 3, 5]  # 12, 12 + 6 and 5 + 5 tokens


def test_a_piece_above_the_budget_is_a_pack_of_its_own() -> None:
    assert make_plan([30, 30, 2], max_residues=30, windows=False, budget=5).packs.tolist() == [0, 1, 2, 3]


def test_a_long_protein_is_cut() -> None:
    plan = make_plan([25], max_residues=10, windows=False, budget=100)
    assert (plan.begin.tolist(), plan.end.tolist()) == ([0], [10])
    assert (plan.pool_begin.tolist(), plan.pool_end.tolist()) == ([0], [10])
    assert plan.counted.tolist() == [10]


def test_windows_of_a_long_protein() -> None:
    plan = make_plan([32], max_residues=12, windows=True, budget=100)
    assert plan.begin.tolist() == [0, 7, 13, 20]
    assert plan.end.tolist() == [12, 19, 25, 32]
    assert plan.pool_begin.tolist() == [0, 9, 16, 22]
    assert plan.pool_end.tolist() == [9, 16, 22, 32]
    assert plan.counted.tolist() == [32, 32, 32, 32]


@pytest.mark.parametrize("length", [1, 32, 33, 34, 47, 48, 56, 57, 100, 1000, 13_100])
def test_windows_count_every_residue_once_and_overlap(length: int) -> None:
    plan = make_plan([length], max_residues=32, windows=True, budget=100)
    order = np.argsort(plan.begin)
    counted = [
        residue
        for piece in order.tolist()
        for residue in range(plan.pool_begin[piece], plan.pool_end[piece])
        if plan.begin[piece] <= residue < plan.end[piece]
    ]
    assert counted == list(range(length))
    assert (plan.end - plan.begin).max() <= 32
    begins, ends = plan.begin[order], plan.end[order]
    assert all(ends[:-1] - begins[1:] >= 8)


@pytest.mark.parametrize("length", [33, 40, 47, 57, 100, 313])
def test_a_residue_counts_in_the_window_that_shows_most_around_it(length: int) -> None:
    plan = make_plan([length], max_residues=32, windows=True, budget=100)

    def context(piece: int, residue: int) -> int:
        """Residues to the nearer cut; the protein's own ends are none."""
        left = residue - int(plan.begin[piece]) if plan.begin[piece] else length
        right = int(plan.end[piece]) - 1 - residue if plan.end[piece] < length else length
        return min(left, right)

    for residue in range(length):
        seen = np.flatnonzero((plan.begin <= residue) & (residue < plan.end)).tolist()
        (chosen,) = np.flatnonzero((plan.pool_begin <= residue) & (residue < plan.pool_end)).tolist()
        # where two windows show as much, to within the border's rounding, either may count
        assert context(chosen, residue) >= max(context(piece, residue) for piece in seen) - 1


@pytest.mark.parametrize("windows", [True, False])
def test_pieces_are_counted_without_a_plan(windows: bool) -> None:
    lengths = np.array([*range(1, 200), 1000, 35_000], dtype=np.int32)
    plan = make_plan(lengths, max_residues=32, windows=windows, budget=100)
    counts = np.bincount(plan.protein, minlength=len(lengths))
    assert count_pieces(lengths, max_residues=32, windows=windows).tolist() == counts.tolist()


def test_no_proteins_make_no_packs() -> None:
    plan = make_plan([], max_residues=10, windows=False, budget=10)
    assert (len(plan.protein), plan.packs.tolist(), plan.residues) == (0, [0], 0)
