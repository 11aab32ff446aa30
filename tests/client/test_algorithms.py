from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbio.client.algorithms import ControlVariates, Scaffold, exclude, proximal_term, restore
from fedbio.errors import FederationError, SettingsError
from fedbio.federation import FLModel
from fedbio.federation.workflows.scaffold import (
    CONTROL,
    COUNTED,
    initial_control,
    split_control,
    updated_control,
    with_control,
)
from fedbio.tensors import weighted_mean

from .conftest import LOOP, ScriptSite

Array = np.ndarray[Any, Any]
Model = dict[str, Array]

F = np.float32

# Three sites, each with a loss a (x - b)^2 / 2 per coordinate, of its own curvature and optimum.
CURVATURES = torch.tensor([[1.0, 0.1], [0.2, 2.0], [0.5, 0.4]])
OPTIMA = torch.tensor([[0.0, 1.0], [4.0, -2.0], [-3.0, 5.0]])
JOINT_OPTIMUM = ((CURVATURES * OPTIMA).sum(0) / CURVATURES.sum(0)).numpy()

SITES, STEPS, RATE = 3, 10, 0.1


@dataclass
class Received:
    """What `flare.receive` gives, as far as it matters here."""

    params: Any
    current_round: int = 0
    meta: dict[str, Any] = field(default_factory=dict)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2))

    def loss(self, site: int) -> torch.Tensor:
        return (CURVATURES[site] * (self.x - OPTIMA[site]).square()).sum() / 2


def tensors(params: Model) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(each.copy()) for name, each in params.items()}


def train(model: Point, site: int, before_step: Any = None, mu: float | None = None) -> Model:
    """Train as a site's script would; return what it sends of its model."""
    reference = {name: each.clone() for name, each in model.state_dict().items()}
    for _ in range(STEPS):
        model.zero_grad()
        loss = model.loss(site) if mu is None else model.loss(site) + proximal_term(model, reference, mu)
        loss.backward()
        if before_step is not None:
            before_step()
        # what torch.optim.SGD does, whose first use imports torch's compiler
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return {name: each.numpy().copy() for name, each in model.state_dict().items()}


def averaged(rounds: int, mu: float | None = None) -> Array:
    """Return where federated averaging comes to, with FedProx if `mu` is given."""
    common = {"x": np.zeros(2, F)}
    for _ in range(rounds):
        updates = []
        for site in range(SITES):
            model = Point()
            model.load_state_dict(tensors(common))
            updates.append((f"site-{site}", train(model, site, mu=mu), 1.0))
        common = weighted_mean(updates)
    return common["x"]


def scaffold_round(
    number: int, common: Model, control: Model, folder: Path, sites: list[int], counted: dict[str, int] | None = None
) -> tuple[Model, list[tuple[str, Model]]]:
    """Run a round with the helper; return the mean model and the changes of the variates."""
    updates, changes = [], []
    for site in sites:
        name = f"site-{site}"
        received = Received(tensors(with_control(common, control)), number)
        if counted is not None:
            received.meta[COUNTED] = counted
        model = Point()
        scaffold = Scaffold(model, received, RATE, folder / name, site=name)
        model.load_state_dict(received.params)
        trained = train(model, site, scaffold.correct)
        change = {key: each.numpy() for key, each in scaffold.finish().items()}
        params, control_change = split_control({**trained, **change})
        updates.append((name, params, 1.0))
        changes.append((name, control_change))
    return weighted_mean(updates), changes


# scripts in processes of their own

ALL_OF_THEM = """
import torch
from torch import nn
import fedbio.client as flare
from fedbio.client.algorithms import Scaffold, exclude, proximal_term, restore

torch.manual_seed(0)
model = nn.ModuleDict({"fc": nn.Linear(3, 1), "bn": nn.BatchNorm1d(3)})
x, y = torch.randn(8, 3), torch.randn(8, 1)
flare.init()
kept = flare.system_info()["workspace"] + "/own.safetensors"
while flare.is_running():
    input_model = flare.receive()
    scaffold = Scaffold(model, input_model, 0.1, flare.system_info()["workspace"])
    model.load_state_dict(restore(input_model.params, model.state_dict(), keep=kept))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model["fc"](model["bn"](x)), y)
        loss = loss + proximal_term(model, input_model.params, input_model.meta["proximal_mu"])
        loss.backward()
        scaffold.correct()
        optimizer.step()
    seen = float(model["bn"].num_batches_tracked)
    params = exclude(model.state_dict(), input_model.meta["exclude"], keep=kept)
    flare.send(flare.FLModel(params={**params, **scaffold.finish()}, metrics={"loss": loss.item(), "seen": seen}))
"""


@pytest.mark.slow
def test_a_torch_script_uses_all_of_them_and_goes_on_after_its_end(site: ScriptSite) -> None:
    params = {"fc.weight": np.zeros((1, 3), F), "fc.bias": np.zeros(1, F)}
    control = {name: np.full_like(each, 0.25) for name, each in params.items()}
    own = initial_control(params)
    seen = []
    for number in range(2):
        # a new process for each round: what is to stay is in files
        site.deploy(ALL_OF_THEM)
        meta = {"proximal_mu": 0.5, "exclude": ["bn.*"], COUNTED: {"site-1": number - 1} if number else {}}
        answer = site.train(FLModel(params=with_control(params, control), current_round=number, meta=meta))
        site.end()
        trained, change = split_control(answer.params)
        assert trained.keys() == change.keys() == params.keys()
        for name, each in change.items():
            # with four steps of 0.1
            expected = own[name] - control[name] + (params[name] - trained[name]) / 0.4
            own[name] = own[name] + each
            np.testing.assert_allclose(own[name], expected, rtol=1e-5, atol=1e-6)
        params = trained
        seen.append(answer.metrics["seen"])
    assert seen == [4.0, 8.0]


def test_a_script_without_torch_corrects_its_gradients(site: ScriptSite) -> None:
    site.deploy(
        LOOP.replace("flare.init()", "from fedbio.client.algorithms import ControlVariates\nflare.init()")
        + """
    variates = ControlVariates(model, 0.5, flare.system_info()["workspace"])
    weight = model.params["w"]
    for step in range(2):
        weight -= 0.5 * ((weight - 3) + variates.correction["w"])
    flare.send(flare.FLModel(params={"w": weight, **variates.finish({"w": weight}, 2)}))
"""
    )
    sent = {"w": np.zeros(1, F), CONTROL + "w": np.full(1, 1.0, F)}
    first = site.train(FLModel(params=sent, current_round=0, meta={COUNTED: {}})).params
    # towards 3 - 1, half of the way, twice; the mean of the corrected gradients -2 and -1, less c
    assert {name: each.tolist() for name, each in first.items()} == {"w": [1.5], CONTROL + "w": [-2.5]}
    second = site.train(FLModel(params=sent, current_round=1, meta={COUNTED: {"site-1": 0}})).params
    # c - c_i is 3.5 now: towards -0.5
    assert {name: each.tolist() for name, each in second.items()} == {"w": [-0.375], CONTROL + "w": [-0.625]}
    site.end()


# FedProx


def test_proximal_term_is_the_papers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    received = {name: each.numpy() + 0.5 for name, each in model.state_dict().items()}
    term = proximal_term(model, received, 0.3)
    # only parameters count, not the statistics of the normalization: 4 * 3 + 4 + 4 + 4 + 4 + 1 values, each 0.5 away
    assert float(term.detach()) == pytest.approx(0.3 / 2 * 29 * 0.25, rel=1e-6)
    term.backward()
    for name, parameter in model.named_parameters():
        expected = 0.3 * (parameter.detach() - torch.from_numpy(received[name]))
        torch.testing.assert_close(parameter.grad, expected)


def test_proximal_term_takes_tensors_and_leaves_what_is_frozen_or_stays_at_the_site() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight.requires_grad_(False)
    received = {"0.weight": model[0].weight.detach() + 2, "1.weight": model[1].weight.detach() + 7}
    assert float(proximal_term(model, received, 1.0).detach()) == pytest.approx(2.0)


def test_proximal_term_keeps_the_dtype_of_the_model() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    received = {name: each.float().numpy() for name, each in model.state_dict().items()}
    assert proximal_term(model, received, 1.0).dtype == torch.bfloat16


def test_fedprox_settles_nearer_to_the_joint_optimum_than_federated_averaging() -> None:
    np.testing.assert_array_equal(averaged(3), averaged(3, mu=0.0))
    distances = []
    for mu in (0.0, 1.0, 5.0):
        # a step takes a site towards (a b + mu x) / (a + mu), and leaves 1 - RATE (a + mu) of the way; where all sites'
        # changes cancel, x is the mean of all b by what is gone of the way, times a / (a + mu)
        share = CURVATURES / (CURVATURES + mu) * (1 - (1 - RATE * (CURVATURES + mu)) ** STEPS)
        settled = ((share * OPTIMA).sum(0) / share.sum(0)).numpy()
        np.testing.assert_allclose(averaged(80, mu), settled, atol=1e-3)
        distances.append(float(np.linalg.norm(settled - JOINT_OPTIMUM)))
    assert distances[0] > distances[1] > distances[2] > 0


def test_proximal_term_says_what_does_not_fit() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(FederationError, match="the reference has none of the model's trained parameters"):
        proximal_term(model, {"module.weight": np.zeros((2, 2), F)}, 1.0)
    # (2, 2) and (2,) would broadcast
    with pytest.raises(FederationError, match=r"'weight' has shape \[2, 2\], the reference \[2\]"):
        proximal_term(model, {"weight": np.zeros(2, F)}, 1.0)


# SCAFFOLD


def test_scaffold_is_the_papers_over_rounds_in_which_not_all_sites_take_part(tmp_path: Path) -> None:
    common, dice = {"x": np.zeros(2, F)}, np.random.default_rng(0)
    control = initial_control(common)
    # Algorithm 1 in float64
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((SITES, 2))
    curvatures, optima = CURVATURES.double().numpy(), OPTIMA.double().numpy()
    for number in range(8):
        sites = sorted(dice.choice(SITES, 2, replace=False).tolist())
        common, changes = scaffold_round(number, common, control, tmp_path, sites)
        control = updated_control(control, changes, SITES)
        trained, after = {}, own.copy()
        for site in sites:
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (curvatures[site] * (y - optima[site]) - own[site] + c)
            trained[site] = y
            after[site] = own[site] - c + (x - y) / (STEPS * RATE)
        c = c + (after - own).sum(axis=0) / SITES
        x, own = np.mean(list(trained.values()), axis=0), after
        np.testing.assert_allclose(common["x"], x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(control["x"], c, rtol=1e-5, atol=1e-5)


def test_scaffold_reaches_the_joint_optimum_where_federated_averaging_settles_beside_it(tmp_path: Path) -> None:
    common = {"x": np.zeros(2, F)}
    control = initial_control(common)
    for number in range(80):
        common, changes = scaffold_round(number, common, control, tmp_path, [0, 1, 2])
        control = updated_control(control, changes, SITES)
    np.testing.assert_allclose(common["x"], JOINT_OPTIMUM, atol=1e-3)
    assert np.linalg.norm(averaged(80) - JOINT_OPTIMUM) > 0.1


@pytest.mark.parametrize("says", [True, False])
def test_a_round_that_is_done_again_gives_the_same_bits(tmp_path: Path, says: bool) -> None:
    common = {"x": np.zeros(2, F)}
    control = initial_control(common)
    counted: dict[str, int] = {}
    for number in range(3):
        meta = dict(counted) if says else None
        first = scaffold_round(number, common, control, tmp_path, [0, 1, 2], meta)
        # new objects, as in a script that was killed before its result was sent
        again = scaffold_round(number, common, control, tmp_path, [0, 1, 2], meta)
        assert first[0]["x"].tobytes() == again[0]["x"].tobytes()
        assert [change["x"].tobytes() for _, change in first[1]] == [change["x"].tobytes() for _, change in again[1]]
        common, control = first[0], updated_control(control, first[1], SITES)
        counted |= {f"site-{site}": number for site in range(SITES)}


def test_a_result_that_was_not_counted_is_taken_back(tmp_path: Path) -> None:
    common = {"x": np.zeros(2, F)}
    control, counted = initial_control(common), dict[str, int]()
    dice = np.random.default_rng(3)
    for number in range(120):
        common_after, changes = scaffold_round(number, common, control, tmp_path, [0, 1, 2], counted)
        if number < 40 and dice.random() < 0.7:
            # every site trained, but one of them was too late
            late = f"site-{dice.integers(SITES)}"
            changes = [each for each in changes if each[0] != late]
        control = updated_control(control, changes, SITES)
        counted |= {site: number for site, _ in changes}
        common = common_after
    np.testing.assert_allclose(common["x"], JOINT_OPTIMUM, atol=1e-3)


def test_a_file_of_a_site_that_never_counted_is_not_taken_up(tmp_path: Path) -> None:
    received = Received({"w": np.ones(1, F), CONTROL + "w": np.zeros(1, F)}, 3)
    ControlVariates(received, 0.1, tmp_path).finish({"w": np.zeros(1, F)}, 5)
    received = Received({"w": np.ones(1, F), CONTROL + "w": np.zeros(1, F)}, 9, {COUNTED: {"other": 3}})
    assert ControlVariates(received, 0.1, tmp_path, site="mine").correction["w"].tolist() == [0.0]


def test_variates_leave_the_parameters_to_the_script(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    params = {name: each.numpy() for name, each in model.state_dict().items()}
    received = Received(tensors(with_control(params, initial_control(params))))
    scaffold = Scaffold(model, received, 0.1, tmp_path)
    model.load_state_dict(received.params)
    model(torch.ones(4, 2)).sum().backward()
    scaffold.correct()
    sent = scaffold.finish()
    assert sorted(sent) == sorted(CONTROL + name for name in ("0.weight", "0.bias", "1.weight", "1.bias"))
    assert all(each.dtype == torch.float32 for each in sent.values())


def test_what_is_frozen_or_unused_has_no_correction_and_its_variate_stays(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight.requires_grad_(False)
    params = {name: each.numpy().copy() for name, each in model.state_dict().items()}
    control = {name: np.full((1, 1), 0.5, F) for name in params}
    scaffold = Scaffold(model, Received(tensors(with_control(params, control))), 0.1, tmp_path)
    model[0](torch.ones(1, 1)).sum().backward()
    scaffold.correct()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.item() == 1.5
    assert model[1].weight.grad is None
    assert model[2].weight.grad is None
    sent = scaffold.finish()
    assert sent[CONTROL + "1.weight"].item() == 0.0


def test_half_precision_models_are_corrected(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    params = {"weight": model.weight.detach().float().numpy()}
    scaffold = Scaffold(model, Received(with_control(params, {"weight": np.full((1, 1), 0.5, F)})), 0.1, tmp_path)
    model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    scaffold.correct()
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 1.5
    assert scaffold.finish()[CONTROL + "weight"].dtype == torch.float32


def test_arrays_that_are_trained_in_place_are_compared_with_what_was_received(tmp_path: Path) -> None:
    weight = np.array([1.0, 2.0], F)
    received = Received({"w": weight, CONTROL + "w": np.array([0.5, 0.0], F)})
    variates = ControlVariates(received, 0.1, tmp_path)
    assert list(received.params) == ["w"]
    assert variates.correction["w"].tolist() == [0.5, 0.0]
    weight -= np.array([0.4, 0.8], F)
    # (x - y) / (K eta) - c, with K = 4 and eta = 0.1
    np.testing.assert_allclose(variates.finish({"w": weight}, 4)[CONTROL + "w"], [0.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"fc": {"w": np.ones(1, F)}, "scaffold/fc": {"w": np.full(1, 0.5, F)}}, {"fc": {"w": np.zeros(1, F)}}),
        ({"fc": [np.ones(1, F)], "scaffold/fc.0": np.full(1, 0.5, F)}, {"fc": [np.zeros(1, F)]}),
        ({0: np.ones(1, F), "scaffold/0": np.full(1, 0.5, F)}, [np.zeros(1, F)]),
    ],
)
def test_nested_parameters_are_understood(params: dict[Any, Any], left: Any, tmp_path: Path) -> None:
    received = Received(params)
    variates = ControlVariates(received, 0.1, tmp_path)
    assert len(received.params) == 1
    assert [each.tolist() for each in variates.correction.values()] == [[0.5]]
    # (x - y) / (K eta) - c, with K = 10 and eta = 0.1
    assert [each.tolist() for each in variates.finish(left, 10).values()] == [[0.5]]


def test_scaffold_says_what_does_not_fit(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    for params in ({"weight": torch.ones(1, 1)}, [torch.ones(1, 1)], None):
        with pytest.raises(FederationError, match=r"no control variates came with the model; set `scaffold: true`"):
            Scaffold(model, Received(params), 0.1, tmp_path)
    other = {"module.weight": torch.ones(1, 1), CONTROL + "module.weight": torch.zeros(1, 1)}
    with pytest.raises(FederationError, match=r"must be those of model.named_parameters\(\)"):
        Scaffold(model, Received(other), 0.1, tmp_path)

    def received(number: int) -> Received:
        return Received({"w": np.ones(1, F), CONTROL + "w": np.zeros(1, F)}, number)

    with pytest.raises(ValueError, match="learning_rate is 0"):
        ControlVariates(received(0), 0, tmp_path)
    with pytest.raises(ValueError, match="0 steps were taken"):
        ControlVariates(received(0), 0.1, tmp_path).finish({"w": np.ones(1, F)}, 0)
    ControlVariates(received(7), 0.1, tmp_path).finish({"w": np.ones(1, F)}, 1)
    with pytest.raises(FederationError, match=r"this variate is of round 7, but the job is in round 0; give each job"):
        ControlVariates(received(0), 0.1, tmp_path)


# FedBN


def test_what_is_excluded_stays_and_comes_back() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "bn1": nn.BatchNorm1d(2)})
    own = model.state_dict()
    sent = exclude(own, ["bn*"])
    assert list(sent) == ["fc.weight", "fc.bias"]
    received = {name: each + 1 for name, each in sent.items()}
    whole = restore(received, own)
    assert list(whole) == list(own)
    model.load_state_dict(whole)
    assert whole["fc.bias"] is received["fc.bias"]
    assert whole["bn1.running_var"] is own["bn1.running_var"]


def test_what_stays_outlives_the_script(tmp_path: Path) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "bn": nn.BatchNorm1d(2), "rough": nn.Linear(1, 1).bfloat16()})
    model["bn"](torch.randn(5, 2))
    own = {name: each.clone() for name, each in model.state_dict().items()}
    file = tmp_path / "own.safetensors"
    fresh = nn.ModuleDict({"fc": nn.Linear(2, 2), "bn": nn.BatchNorm1d(2), "rough": nn.Linear(1, 1).bfloat16()})
    assert restore({}, own, keep=file) == own
    sent = exclude(own, ["bn.*", "rough.*"], keep=file)
    fresh.load_state_dict(restore(sent, fresh.state_dict(), keep=file))
    for name, each in fresh.state_dict().items():
        assert each.dtype == own[name].dtype
        assert torch.equal(each, own[name])


def test_what_stays_may_be_arrays(tmp_path: Path) -> None:
    own = {"w": np.ones(2), "scale": np.array(3, np.int16)}
    assert list(exclude(own, ["scale"], keep=tmp_path / "own")) == ["w"]
    whole = restore({"w": np.zeros(2)}, {"w": np.ones(2), "scale": np.array(0, np.int16)}, keep=tmp_path / "own")
    assert whole["w"].tolist() == [0, 0]
    assert (whole["scale"].item(), whole["scale"].dtype) == (3, np.int16)
    assert whole["scale"].flags.writeable


def test_exclusion_says_what_does_not_fit() -> None:
    own = {"fc.weight": np.ones(1), "bn.weight": np.ones(1)}
    with pytest.raises(SettingsError, match=r"'\*.norm\*' fits no parameter; the names are bn.weight, fc.weight"):
        exclude(own, ["bn*", "*.norm*"])
    with pytest.raises(SettingsError, match="leaves no parameter that could be sent"):
        exclude(own, ["*"])
    with pytest.raises(FederationError, match=r"'head.weight' was received, but this site's model has no"):
        restore({"head.weight": np.ones(1)}, own)


def test_scripts_without_torch_stay_without_it(tmp_path: Path) -> None:
    script = f"""
import sys
import numpy as np
from fedbio.client.algorithms import ControlVariates, exclude, restore

class Received:
    params, current_round, meta = {{"w": np.ones(2, "f4"), "scaffold/w": np.zeros(2, "f4")}}, 0, {{}}

variates = ControlVariates(Received, 0.1, {str(tmp_path)!r})
variates.finish({{"w": np.zeros(2, "f4")}}, 3)
own = {{"w": np.ones(2), "b": np.ones(1)}}
restore(exclude(own, ["b"], keep={str(tmp_path / "own")!r}), own, keep={str(tmp_path / "own")!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
