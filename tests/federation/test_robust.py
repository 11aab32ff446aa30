from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedbio.errors import FederationError, ProtocolError
from fedbio.federation.workflows import robust
from fedbio.federation.workflows.robust import coordinate_median, krum, norm_outliers, trimmed_mean

Array = np.ndarray[Any, Any]
Model = dict[str, Array]
Update = tuple[str, Model, float]

F = np.float32

RULES: list[Callable[[list[Update]], Model]] = [
    coordinate_median,
    lambda updates: trimmed_mean(updates, 0.25),
    lambda updates: krum(updates, 1),
]
"""Each withstands one bad site of five."""


def draw(sites: int, seed: int = 0) -> list[Update]:
    """Return updates of several dtypes and shapes, in an order of arrival that is not that of the names."""
    dice = np.random.default_rng(seed)
    updates = [
        (
            f"site-{number}",
            {
                "weight": dice.standard_normal((5, 7)).astype(F),
                "bias": dice.standard_normal(7).astype(np.float16),
                "scale": np.array(dice.standard_normal(), np.float64),
                "batches": np.array(dice.integers(100, 200), np.int64),
                "table": dice.standard_normal((4, 6)).astype(F).T,
            },
            float(dice.integers(1, 100)),
        )
        for number in range(sites)
    ]
    return [updates[place] for place in dice.permutation(sites)]


def model(*values: float) -> Model:
    return {"w": np.array(values, F)}


def columns(updates: list[Update], name: str) -> Array:
    return np.stack([np.asarray(params[name], np.float64) for _, params, _ in updates])


# the papers' definitions, a coordinate at a time


def median_of(values: Array) -> float:
    ordered = sorted(values.tolist())
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def trimmed_mean_of(values: Array, cut: int) -> float:
    kept = sorted(values.tolist())[cut : len(values) - cut]
    return sum(kept) / len(kept)


def krum_of(updates: list[Update], byzantine: int) -> str:
    """Return the site that section 4 of Blanchard et al. chooses."""
    names = ["weight", "bias", "scale", "table"]
    vectors = {
        site: np.concatenate([np.asarray(params[name], np.float64).ravel() for name in names])
        for site, params, _ in updates
    }
    scores = {}
    for site, vector in vectors.items():
        squares = sorted(np.sum((vector - other) ** 2) for name, other in vectors.items() if name != site)
        scores[site] = sum(squares[: len(updates) - byzantine - 2])
    return min(sorted(scores), key=lambda site: scores[site])


@pytest.mark.parametrize("sites", [1, 2, 3, 6, 9])
def test_median_is_the_papers_in_every_coordinate(sites: int) -> None:
    updates = draw(sites)
    median = coordinate_median(updates)
    for name, tensor in median.items():
        expected = np.apply_along_axis(median_of, 0, columns(updates, name))
        np.testing.assert_array_equal(tensor, expected.astype(F))


@pytest.mark.parametrize(("sites", "trim", "cut"), [(3, 0.2, 1), (5, 0.2, 1), (10, 0.3, 3), (9, 0.3, 2), (4, 0.0, 0)])
def test_trimmed_mean_is_the_papers_in_every_coordinate(sites: int, trim: float, cut: int) -> None:
    updates = draw(sites)
    mean = trimmed_mean(updates, trim)
    for name, tensor in mean.items():
        expected = np.apply_along_axis(trimmed_mean_of, 0, columns(updates, name), cut)
        np.testing.assert_allclose(tensor, expected.astype(F), rtol=1e-6)


def test_a_share_that_floating_point_makes_too_small_still_trims_as_many() -> None:
    updates = [(f"{number:03}", model(number), 1.0) for number in range(100)]
    # 0.29 * 100 is 28.999999999999996; with one more at either end, values are cut off that this outlier must not join
    updates[70] = ("070", model(1e6), 1.0)
    kept = sorted([*range(70), *range(71, 100), 1e6])[29:71]
    assert trimmed_mean(updates, 0.29)["w"][0] == F(sum(kept) / len(kept))


@pytest.mark.parametrize(("sites", "byzantine"), [(3, 0), (5, 1), (8, 1), (9, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_krum_chooses_whom_the_paper_chooses(sites: int, byzantine: int, seed: int) -> None:
    updates = draw(sites, seed)
    chosen = {site: params for site, params, _ in updates}[krum_of(updates, byzantine)]
    found = krum(updates, byzantine)
    assert found.keys() == chosen.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, np.asarray(chosen[name]).astype(F))


def test_krum_takes_the_first_by_name_of_equals() -> None:
    # a and e are the mirror images of each other, and so are b and d; c is as far from its neighbours as b and d
    updates = [(name, model(value), 1.0) for name, value in zip("edcba", (2, 1, 0, -1, -2), strict=True)]
    assert krum(updates, 1)["w"].tolist() == [-1.0]


@pytest.mark.parametrize("rule", RULES)
def test_shapes_stay_and_the_dtype_is_that_of_means(rule: Callable[[list[Update]], Model]) -> None:
    updates = draw(5)
    found = rule(updates)
    assert list(found) == list(updates[0][1])
    assert {name: each.shape for name, each in found.items()} == {
        "weight": (5, 7), "bias": (7,), "scale": (), "batches": (), "table": (6, 4)
    }  # fmt: skip
    assert {each.dtype for each in found.values()} == {np.dtype(F)}


@pytest.mark.parametrize("rule", RULES)
@given(order=st.permutations(range(5)), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_order_of_arrival_leaves_no_trace(rule: Callable[[list[Update]], Model], order: list[int], seed: int) -> None:
    updates = draw(5, seed)
    first, second = rule(updates), rule([updates[place] for place in order])
    assert {name: each.tobytes() for name, each in first.items()} == {
        name: each.tobytes() for name, each in second.items()
    }


@pytest.mark.parametrize("rule", RULES)
@given(
    honest=arrays(F, (4, 3), elements=st.floats(-100, 100, width=32)),
    bad=arrays(F, 3, elements=st.one_of(st.floats(width=32), st.sampled_from([1e30, -1e30, 3.4e38]))),
    place=st.integers(0, 4),
)
@settings(max_examples=100, deadline=None)
def test_one_bad_site_cannot_leave_the_range_of_the_honest_ones(
    rule: Callable[[list[Update]], Model], honest: Array, bad: Array, place: int
) -> None:
    rows = np.insert(honest, place, bad, axis=0)
    found = rule([(f"site-{number}", {"w": row}, 1.0) for number, row in enumerate(rows)])["w"]
    if rule is RULES[2] and (found == bad).all():
        # Krum may choose the bad one, but only from among the honest ones: the squares of its distances to two of them
        # add up to no more than those of some honest one
        spread = max(np.linalg.norm(a.astype(float) - b) for a, b in itertools.combinations(honest, 2))
        nearest = sorted(np.linalg.norm(bad.astype(float) - each) for each in honest)
        assert nearest[1] <= spread * np.sqrt(2) * (1 + 1e-9)
        return
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()


def test_mean_is_moved_by_what_the_rules_withstand() -> None:
    updates = [*((f"site-{number}", model(number), 1.0) for number in range(4)), ("mallory", model(1e30), 1e12)]
    assert [rule(updates)["w"].tolist() for rule in RULES] == [[2.0], [2.0], [1.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", RULES)
def test_values_that_are_no_numbers_do_not_spread(rule: Callable[[list[Update]], Model], bad: float) -> None:
    updates = [*((f"site-{number}", model(number), 1.0) for number in range(4)), ("a", model(bad), 1.0)]
    assert 0 <= rule(updates)["w"][0] <= 3


@pytest.mark.parametrize("rule", RULES)
def test_blocks_leave_no_trace(rule: Callable[[list[Update]], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    updates = draw(5)
    whole = rule(updates)
    monkeypatch.setattr(robust, "TABLE_VALUES", 5 * 3)
    for name, tensor in rule(updates).items():
        np.testing.assert_array_equal(tensor, whole[name])


@pytest.mark.parametrize("rule", RULES)
def test_memory_beyond_the_result_does_not_grow_with_the_model(rule: Callable[[list[Update]], Model]) -> None:
    size = 4 << 20
    updates = [(name, {"w": np.full(size, number, F)}, 1.0) for number, name in enumerate("abcde")]
    tracemalloc.start()
    rule(updates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size * 4 + 3 * robust.TABLE_VALUES * 8


def test_too_few_updates_say_what_to_do() -> None:
    two = [("a", model(1), 1.0), ("b", model(2), 1.0)]
    with pytest.raises(FederationError, match=r"2 update\(s\) came, and nothing is left without 1 at each end"):
        trimmed_mean(two, 0.2)
    with pytest.raises(FederationError, match=r"2 update\(s\) came, and 5 are needed to withstand 1 site"):
        krum(two, 1)
    with pytest.raises(FederationError, match=r"no update is near 2 others: more than 1 site\(s\) sent values"):
        krum([(name, model(np.nan if name < "d" else 1.0), 1.0) for name in "abcde"], 1)


@pytest.mark.parametrize("rule", [*RULES, lambda updates: norm_outliers(None, updates, 2.0)])
def test_updates_that_do_not_fit_are_refused(rule: Callable[[list[Update]], Any]) -> None:
    four = [(name, model(1.0), 1.0) for name in "abcd"]
    with pytest.raises(ProtocolError, match=r"e: tensor 'w': shape \[2\], expected \[1\]"):
        rule([*four, ("e", model(1.0, 2.0), 1.0)])
    with pytest.raises(ProtocolError, match="e: tensor 'v' is not in every model"):
        rule([*four, ("e", {**model(1.0), "v": np.ones(1, F)}, 1.0)])
    with pytest.raises(ValueError, match="there is no model"):
        rule([])


def test_outliers_are_named_with_their_numbers() -> None:
    base = {"w": np.array([10.0, 10.0], F), "n": np.array(5)}
    changes = {"a": (3.0, 4.0), "b": (0.0, 6.0), "c": (3000.0, 4000.0), "d": (-4.0, 3.0)}
    updates = [(site, {"w": base["w"] + np.array(each, F), "n": base["n"]}, 1.0) for site, each in changes.items()]
    (outlier,) = norm_outliers(base, updates, 10.0)
    assert outlier == ("c", 5000.0, 5.5, 10.0)
    assert outlier.reason.startswith("its change has norm 5000, more than 10 times 5.5, the median of all sites")
    assert norm_outliers(base, updates, 1000.0) == []


def test_outliers_of_differences_are_those_of_models() -> None:
    updates = draw(5)
    updates[2] = (updates[2][0], {name: each * 40 for name, each in updates[2][1].items()}, 1.0)
    zeros = {name: np.zeros_like(each) for name, each in updates[0][1].items()}
    assert [each.site for each in norm_outliers(None, updates, 5.0)] == [updates[2][0]]
    assert norm_outliers(None, updates, 5.0) == norm_outliers(zeros, updates, 5.0)


def test_norm_is_over_all_tensors_but_counters() -> None:
    updates = draw(3)
    norms = {
        site: np.sqrt(sum(np.sum(np.asarray(params[name], float) ** 2) for name in params if name != "batches"))
        for site, params, _ in updates
    }
    median = sorted(norms.values())[1]
    found = {each.site: each for each in norm_outliers(None, updates, 1e-9)}
    assert found.keys() == norms.keys()
    for site, norm in norms.items():
        np.testing.assert_allclose(found[site][1:], (norm, median, 1e-9), rtol=1e-12)


@pytest.mark.parametrize("bad", [1e30, float("inf"), float("nan")])
def test_outliers_are_found_at_any_size(bad: float) -> None:
    updates = [("a", model(1.0), 1.0), ("b", model(1.1), 1.0), ("c", model(bad), 1.0)]
    assert [each.site for each in norm_outliers(model(0.0), updates, 1000.0)] == ["c"]
