from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FederationError, ProtocolError
from fedbio.federation.workflows.scaffold import (
    CONTROL,
    initial_control,
    split_control,
    updated_control,
    with_control,
)

Array = np.ndarray[Any, Any]
Model = dict[str, Array]

F = np.float32

# Three sites, each with a loss (x - b)' A (x - b) / 2 of its own: other optima, and other curvatures.
CURVATURES = np.array([[1.0, 0.1], [0.2, 2.0], [0.5, 0.4]])
OPTIMA = np.array([[0.0, 1.0], [4.0, -2.0], [-3.0, 5.0]])
JOINT_OPTIMUM = (CURVATURES * OPTIMA).sum(axis=0) / CURVATURES.sum(axis=0)

STEPS, RATE = 10, 0.1


def train(site: int, x: Array, control: Array, own: Array) -> tuple[Array, Array]:
    """Algorithm 1 of Karimireddy et al., lines 8 to 13 with option II; return y and the next c_i."""
    y = x.copy()
    for _ in range(STEPS):
        gradient = CURVATURES[site] * (y - OPTIMA[site])
        y = y - RATE * (gradient - own + control)
    return y, own - control + (x - y) / (STEPS * RATE)


def test_c_is_the_papers_over_rounds_in_which_not_all_sites_take_part() -> None:
    dice = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (), "table": (5, 2)}
    model = {name: np.zeros(shape, F) for name, shape in shapes.items()}
    control = initial_control(model)
    expected = {name: np.zeros(shape) for name, shape in shapes.items()}
    for _ in range(6):
        changes = [
            (f"site-{site}", {name: dice.standard_normal(shape).astype(F) for name, shape in shapes.items()})
            for site in dice.choice(7, 3, replace=False)
        ]
        control = updated_control(control, changes, 7)
        # line 17: c + |S| / N times the mean over S
        expected = {
            name: each + 3 / 7 * np.mean([change[name].astype(float) for _, change in changes], axis=0)
            for name, each in expected.items()
        }
    for name, each in control.items():
        assert each.dtype == F
        assert each.shape == shapes[name]
        np.testing.assert_allclose(each, expected[name], rtol=1e-5, atol=1e-6)


def test_sites_reach_the_joint_optimum_where_federated_averaging_settles_beside_it() -> None:
    x, averaged = np.zeros(2), np.zeros(2)
    control = initial_control({"x": np.zeros(2)})
    own = np.zeros((3, 2))
    for _ in range(200):
        trained = [train(site, x, control["x"].astype(float), own[site]) for site in range(3)]
        changes = [(f"site-{site}", {"x": (after - own[site]).astype(F)}) for site, (_, after) in enumerate(trained)]
        control = updated_control(control, changes, 3)
        # what was sent counts: rounded to float32
        own = np.array([own[site] + change["x"] for site, (_, change) in enumerate(changes)])
        x = np.mean([y for y, _ in trained], axis=0)
        averaged = np.mean([train(site, averaged, np.zeros(2), np.zeros(2))[0] for site in range(3)], axis=0)
    np.testing.assert_allclose(x, JOINT_OPTIMUM, atol=1e-5)
    assert np.linalg.norm(averaged - JOINT_OPTIMUM) > 0.1
    # c is the mean of all c_i
    np.testing.assert_allclose(control["x"], own.mean(axis=0), atol=1e-5)


def test_weights_of_sites_are_those_of_their_losses() -> None:
    weights = {"site-0": 10.0, "site-1": 30.0, "site-2": 60.0}
    share = np.array([[0.1], [0.3], [0.6]]) * CURVATURES
    x, own = np.zeros(2), np.zeros((3, 2))
    control = initial_control({"x": np.zeros(2)})
    for number in range(300):
        sites = [each for each in range(3) if each != number % 4]
        trained = {site: train(site, x, control["x"].astype(float), own[site]) for site in sites}
        changes = [(f"site-{site}", {"x": (after - own[site]).astype(F)}) for site, (_, after) in trained.items()]
        control = updated_control(control, changes, 3, weights=weights)
        for site, (_, change) in zip(sites, changes, strict=True):
            own[site] += change["x"]
        # however models are averaged
        x = np.mean([y for y, _ in trained.values()], axis=0)
    np.testing.assert_allclose(x, (share * OPTIMA).sum(axis=0) / share.sum(axis=0), atol=1e-4)


def test_order_of_arrival_leaves_no_trace() -> None:
    dice = np.random.default_rng(1)
    control = {"w": dice.standard_normal(100).astype(F)}
    changes = [(f"site-{n}", {"w": (dice.standard_normal(100) * 10.0**n).astype(F)}) for n in range(4)]
    found = {updated_control(control, order, 9)["w"].tobytes() for order in itertools.permutations(changes)}
    assert len(found) == 1


def test_without_changes_c_stays() -> None:
    control = {"w": np.arange(3, dtype=F)}
    assert updated_control(control, [], 3)["w"].tolist() == [0, 1, 2]


def test_what_is_trained_has_a_variate() -> None:
    model = {
        "fc.weight": np.ones((2, 3), np.float16),
        "scale": np.array(2.0),
        "bn.running_var": np.ones(3, F),
        "bn.num_batches_tracked": np.array(4),
    }
    control = initial_control(model)
    assert {name: (each.shape, each.dtype, each.any()) for name, each in control.items()} == {
        "fc.weight": ((2, 3), np.dtype(F), False),
        "scale": ((), np.dtype(F), False),
    }


def test_variates_travel_beside_the_model() -> None:
    model, control = {"w": np.ones(2, F), "n": np.array(1)}, {"w": np.zeros(2, F)}
    sent = with_control(model, control)
    assert list(sent) == ["w", "n", "scaffold/w"]
    assert split_control(sent) == (model, control)
    assert split_control(model) == (model, {})


def test_variates_that_do_not_fit_are_refused() -> None:
    control = {"w": np.zeros(2, F)}
    with pytest.raises(ProtocolError, match=r"b: tensor 'w': shape \[1\], expected \[2\]"):
        updated_control(control, [("a", control), ("b", {"w": np.zeros(1, F)})], 2)
    with pytest.raises(ProtocolError, match="a: tensor 'v' is not in every model"):
        updated_control(control, [("a", {**control, "v": np.zeros(1, F)})], 2)
    with pytest.raises(ValueError, match="2 sites changed the variate, but there are 1 in all"):
        updated_control(control, [("a", control), ("b", control)], 1)
    with pytest.raises(FederationError, match="has the name of a control variate; rename it"):
        with_control({CONTROL + "w": np.zeros(2, F)}, control)
