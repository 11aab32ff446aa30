from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from fedbio.errors import FederationError
from fedbio.federation.workflows import server_optimizers
from fedbio.federation.workflows.server_optimizers import ServerOptimization, in_dtypes_of, is_trained
from fedbio.settings_jobs import ServerOptimizer
from fedbio.tensors import open_file, write_file

Array = np.ndarray[Any, Any]
Model = dict[str, Array]
Name = Literal["sgd", "adam", "yogi", "adagrad"]

F = np.float32

NAMES: list[Name] = ["sgd", "adam", "yogi", "adagrad"]


def optimizer(name: Name, **keys: float) -> ServerOptimizer:
    return ServerOptimizer(name=name, **{"learning_rate": 0.1, "momentum": 0.8, "tau": 0.01, **keys})


def draw(seed: int = 0, scale: float = 1.0) -> Model:
    dice = np.random.default_rng(seed)
    return {
        "weight": (scale * dice.standard_normal((6, 5))).astype(F),
        "wide": scale * dice.standard_normal((4, 3)).T,
        "half": (scale * dice.standard_normal(7)).astype(np.float16),
        "scale": np.array(scale * dice.standard_normal(), F),
        "nothing": np.zeros((0, 3), F),
    }


def reference(settings: ServerOptimizer, values: Array, changes: list[Array]) -> Array:
    """Take one tensor through all rounds in float64, line by line as in the papers."""
    x = values.astype(np.float64)
    m = np.zeros_like(x)
    v = np.full_like(x, settings.tau**2)
    b1, b2 = settings.beta_1, settings.beta_2
    for change in changes:
        delta = change.astype(np.float64)
        if settings.name == "sgd":
            # Hsu et al. 2019, section 4.3, with the step size of Reddi et al.
            m = settings.momentum * m + delta
            x = x + settings.learning_rate * m
            continue
        # Reddi et al. 2021, Algorithm 2, lines 9 to 13
        m = b1 * m + (1 - b1) * delta
        if settings.name == "adagrad":
            v = v + delta**2
        elif settings.name == "yogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = b2 * v + (1 - b2) * delta**2
        x = x + settings.learning_rate * m / (np.sqrt(v) + settings.tau)
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_steps_are_the_papers(name: Name, scale: float) -> None:
    settings, begin = optimizer(name), draw()
    changes = [draw(seed, scale) for seed in range(1, 9)]
    model, state = begin, None
    for change in changes:
        model, state = ServerOptimization(settings).step(model, change, state)
    for key, tensor in model.items():
        expected = reference(settings, begin[key], [change[key] for change in changes])
        assert tensor.dtype == begin[key].dtype
        assert tensor.shape == begin[key].shape
        # float16 is rounded after each of eight steps, each time by at most 2^-11 of values up to about 8
        tolerance = {"rtol": 1e-2, "atol": 2e-2} if tensor.dtype == np.float16 else {"rtol": 3e-5, "atol": 3e-6}
        np.testing.assert_allclose(tensor, expected, **tolerance)


def test_the_optimizers_differ() -> None:
    ends = set()
    for name in NAMES:
        model, state = draw(), None
        for seed in range(1, 4):
            model, state = ServerOptimization(optimizer(name)).step(model, draw(seed), state)
        ends.add(model["weight"].tobytes())
    assert len(ends) == len(NAMES)


def test_sgd_with_rate_1_and_no_momentum_is_federated_averaging() -> None:
    model, change = draw(), draw(1)
    stepped, state = ServerOptimization(optimizer("sgd", learning_rate=1, momentum=0)).step(model, change, None)
    assert state == {}
    for key, tensor in stepped.items():
        expected = (model[key].astype(np.float64) + change[key]).astype(model[key].dtype)
        np.testing.assert_array_equal(tensor, expected)


def test_first_step_is_not_corrected_for_bias() -> None:
    settings = ServerOptimizer(name="adam", learning_rate=1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    stepped, state = ServerOptimization(settings).step({"w": np.zeros(1)}, {"w": np.ones(1)}, None)
    second = 0.99 * 1e-6 + 0.01
    assert state["first_moment/w"][0] == pytest.approx(0.1)
    assert state["second_moment/w"][0] == pytest.approx(second)
    assert stepped["w"][0] == pytest.approx(0.1 / (second**0.5 + 1e-3))


@pytest.mark.parametrize("name", NAMES)
def test_a_restart_from_files_changes_no_bit(name: Name, tmp_path: Any) -> None:
    unbroken, state = draw(), None
    broken, kept = draw(), None
    for seed in range(1, 6):
        unbroken, state = ServerOptimization(optimizer(name)).step(unbroken, draw(seed), state)
        broken, kept = ServerOptimization(optimizer(name)).step(broken, draw(seed), kept)
        write_file(tmp_path / f"model-{seed}", broken)
        write_file(tmp_path / f"state-{seed}", kept)
        broken, kept = open_file(tmp_path / f"model-{seed}"), open_file(tmp_path / f"state-{seed}")
    assert {key: each.tobytes() for key, each in broken.items()} == {
        key: each.tobytes() for key, each in unbroken.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_blocks_leave_no_trace(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, moments = ServerOptimization(optimizer(name)).step(draw(), draw(1), None)
    monkeypatch.setattr(server_optimizers, "BLOCK_VALUES", 4)
    parts, others = ServerOptimization(optimizer(name)).step(draw(), draw(1), None)
    for key, tensor in (whole | moments).items():
        np.testing.assert_array_equal(tensor, (parts | others)[key])


def test_what_was_passed_in_is_left_alone() -> None:
    model, change = draw(), draw(1)
    _, state = ServerOptimization(optimizer("adam")).step(model, change, None)
    before = {key: each.copy() for key, each in (state | model).items()}
    ServerOptimization(optimizer("adam")).step(model, change, state)
    for key, tensor in (state | model).items():
        np.testing.assert_array_equal(tensor, before[key])


@pytest.mark.parametrize(
    ("values", "change", "expected"),
    [
        (np.array([3, 4], np.int64), np.array([2, -1], np.int64), [5, 3]),
        (np.array(7, np.int64), np.array(2.6, F), 10),
        (np.array([250, 3], np.uint8), np.array([9.0, -5.0], F), [255, 0]),
        (np.array([-7, 7], np.int16), np.array([40_000.0, 1.0], F), [32767, 8]),
        (np.array([2**62], np.int64), np.array([1], F), [2**62 + 1]),
        (np.array([True, False, True]), np.array([0.0, 1.0, -1.0], F), [True, True, False]),
    ],
)
def test_integers_get_the_change_and_stay_integers(values: Array, change: Array, expected: Any) -> None:
    stepped, state = ServerOptimization(optimizer("adam")).step({"n": values}, {"n": change}, None)
    assert stepped["n"].tolist() == expected
    assert stepped["n"].dtype == values.dtype
    assert state == {}


def test_means_come_back_in_the_dtypes_of_the_model() -> None:
    model = {
        "w": np.zeros(2),
        "half": np.zeros((), np.float16),
        "single": np.zeros(1, F),
        "n": np.zeros(2, np.int64),
        "byte": np.zeros(2, np.uint8),
        "mask": np.zeros(2, bool),
    }
    mean = {
        "w": np.array([0.1, 2], F),
        "half": np.array(0.1, F),
        "single": np.ones(1, F),
        "n": np.array([2.6, -7], F),
        "byte": np.array([300, -3], F),
        "mask": np.array([0.7, 0.3], F),
    }
    cast = in_dtypes_of(model, mean)
    assert {name: each.dtype for name, each in cast.items()} == {name: each.dtype for name, each in model.items()}
    assert cast["w"].tolist() == mean["w"].tolist()
    assert cast["half"] == np.float16(0.1)
    assert cast["single"].tolist() == [1]
    assert cast["n"].tolist() == [3, -7]
    assert cast["byte"].tolist() == [255, 0]
    assert cast["mask"].tolist() == [True, False]


def test_means_that_are_too_large_for_the_model_are_refused() -> None:
    with pytest.raises(FederationError, match="values of 'w' are beyond what float16 holds"):
        in_dtypes_of({"w": np.zeros(1, np.float16)}, {"w": np.array([1e6], F)})
    with pytest.raises(FederationError, match="the mean of the integers 'n' is off by"):
        in_dtypes_of({"n": np.zeros(1, np.int64)}, {"n": np.array([1e30], F)})


def test_running_statistics_get_the_change_and_stay_positive() -> None:
    model = {"bn.running_var": np.array([0.01], F), "bn.weight": np.array([0.01], F)}
    change = {"bn.running_var": np.array([-0.001], F), "bn.weight": np.array([-0.001], F)}
    state = None
    for _ in range(5):
        model, state = ServerOptimization(optimizer("adam", learning_rate=1)).step(model, change, state)
    assert model["bn.running_var"][0] == pytest.approx(0.005)
    assert model["bn.weight"][0] < 0
    assert list(state or {}) == ["first_moment/bn.weight", "second_moment/bn.weight"]


@pytest.mark.parametrize(
    ("name", "dtype", "trained"),
    [
        ("layer.weight", "f4", True),
        ("weight", "f2", True),
        ("running_variance.weight", "f4", True),
        ("bn.running_mean", "f4", False),
        ("running_var", "f4", False),
        ("bn.num_batches_tracked", "i8", False),
        ("mask", "?", False),
    ],
)
def test_what_counts_as_trained(name: str, dtype: str, trained: bool) -> None:
    assert is_trained(name, np.dtype(dtype)) is trained


def test_a_tensor_that_was_held_back_stays_with_its_state() -> None:
    model, state = ServerOptimization(optimizer("adam")).step(draw(), draw(1), None)
    change = {key: each for key, each in draw(2).items() if key != "weight"}
    stepped, after = ServerOptimization(optimizer("adam")).step(model, change, state)
    assert stepped["weight"].tobytes() == model["weight"].tobytes()
    assert after["first_moment/weight"].tobytes() == state["first_moment/weight"].tobytes()
    assert stepped["half"].tobytes() != model["half"].tobytes()


def test_steps_that_would_poison_the_model_end_with_advice() -> None:
    model = {"w": np.ones(2, np.float16)}
    with pytest.raises(FederationError, match="sgd makes values of 'w' that are not finite; lower its learning_rate"):
        ServerOptimization(optimizer("sgd", learning_rate=100)).step(model, {"w": np.full(2, 1e4, F)}, None)
    # the step itself would be finite, but never again move
    with pytest.raises(FederationError, match="values of 'second_moment/w' that are not finite"):
        ServerOptimization(optimizer("adagrad")).step({"w": np.ones(2, F)}, {"w": np.full(2, 1e30, F)}, None)
    with pytest.raises(FederationError, match="the mean of the integers 'n'"):
        ServerOptimization(optimizer("sgd")).step({"n": np.array(1)}, {"n": np.array(1e30, F)}, None)


@pytest.mark.parametrize("other", ["sgd", "model", "shape"])
def test_a_state_of_something_else_is_refused(other: str) -> None:
    model = {"w": np.ones(2, F)}
    _, state = ServerOptimization(optimizer("adam")).step(model, model, None)
    name: Name = "sgd" if other == "sgd" else "adam"
    model = {"sgd": model, "model": {**model, "v": np.ones(1, F)}, "shape": {"w": np.ones(3, F)}}[other]
    with pytest.raises(FederationError, match=r"the saved state of the server's optimizer does not fit"):
        ServerOptimization(optimizer(name)).step(model, model, state)


def test_changes_that_do_not_fit_are_bugs() -> None:
    adam = ServerOptimization(optimizer("adam"))
    with pytest.raises(ValueError, match="tensors that the model lacks: v"):
        adam.step({"w": np.ones(2, F)}, {"v": np.ones(2, F)}, None)
    with pytest.raises(ValueError, match=r"'w' has shape \(1,\), the model has \(2,\)"):
        adam.step({"w": np.ones(2, F)}, {"w": np.ones(1, F)}, None)
