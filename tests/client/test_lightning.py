"""Lightning's trainer in a federation: what `patch` makes of validate and fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fedbio.client.lightning as flare
from fedbio.errors import FederationError

from .at_hand import AtHand, here  # noqa: F401
from .conftest import ScriptSite

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning" / "train.py"
ROWS, BATCH = 24, 8


class Line(lightning.LightningModule):
    """A straight line, fitted in batches whose order does not change."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.line, self.optimizer = torch.nn.Linear(2, 1), optimizer
        self.epochs = 0

    def _loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("loss", self._loss(batch))

    def on_train_epoch_end(self) -> None:
        self.epochs += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.05)

    def data(self) -> DataLoader:
        random = torch.Generator().manual_seed(3)
        features = torch.randn(ROWS, 2, generator=random)
        return DataLoader(TensorDataset(features, features.sum(1, keepdim=True) + 1), BATCH)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **options,
        }
    )


def zeros() -> dict[str, torch.Tensor]:
    return {"line.weight": torch.zeros(1, 2), "line.bias": torch.zeros(1)}


def loop(module: Line, patched: lightning.Trainer, *, validate: bool = True) -> None:
    """The usual script's loop."""
    while flare.is_running():
        flare.receive()
        if validate:
            patched.validate(module, module.data(), verbose=False)
        patched.fit(module, module.data(), module.data())


def trained_by_hand(
    start: dict[str, torch.Tensor],
    epochs: int,
    mu: float = 0.0,
    correction: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Gradient descent on the same batches, without Lightning, on the loss of FedProx or with SCAFFOLD's correction."""
    module = Line()
    module.load_state_dict(start)
    for _ in range(epochs):
        for features, targets in module.data():
            loss = torch.nn.functional.mse_loss(module.line(features), targets)
            loss = loss + mu / 2 * sum((each - start[name]).square().sum() for name, each in module.named_parameters())
            loss.backward()
            with torch.no_grad():
                for name, each in module.named_parameters():
                    each -= 0.05 * (each.grad + (0 if correction is None else torch.from_numpy(correction[name])))
                    each.grad = None
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def loss_of(params: dict[str, torch.Tensor]) -> float:
    module = Line()
    module.load_state_dict(params)
    with torch.no_grad():
        return float(np.mean([float(module._loss(batch)) for batch in module.data()]))


def test_a_round_measures_what_was_received_and_trains_it(here: AtHand) -> None:  # noqa: F811
    starts = [zeros(), {"line.weight": torch.ones(1, 2), "line.bias": torch.ones(1)}]
    for number, start in enumerate(starts):
        here.ask("train", start, number)
    here.end()
    patched = trainer(max_epochs=2)
    flare.patch(patched)
    flare.patch(patched)
    module = Line()
    loop(module, patched)
    assert len(here.results) == 2
    assert module.epochs == 4
    for start, result in zip(starts, here.results, strict=True):
        assert result.model.metrics == pytest.approx({"loss": loss_of(start)}, rel=1e-5)
        expected = trained_by_hand(start, 2)
        assert set(result.model.params) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(result.model.params[name], value, rtol=1e-5)


def test_a_script_that_only_fits_sends_no_metrics_and_its_own_meta(here: AtHand) -> None:  # noqa: F811
    here.ask("train", zeros())
    here.end()
    patched, module = trainer(), Line()
    module.__fl_meta__ = {"NUM_STEPS_CURRENT_ROUND": 3, "note": "kept"}
    flare.patch(patched)
    loop(module, patched, validate=False)
    (result,) = here.results
    assert result.model.metrics == {}
    assert result.model.meta["weight"] == 3
    assert result.model.meta["note"] == "kept"


def test_an_evaluation_trains_nothing_and_leaves_the_sites_own_model(here: AtHand) -> None:  # noqa: F811
    ones = {"line.weight": torch.ones(1, 2), "line.bias": torch.ones(1)}
    here.ask("train", zeros())
    here.ask("evaluate", ones)
    here.ask("evaluate", zeros())
    here.ask("submit_model", {})
    here.ask("train", ones)
    here.end()
    patched, module = trainer(), Line()
    flare.patch(patched)
    loop(module, patched)
    trained, on_ones, on_zeros, own, again = (each.model for each in here.results)
    assert on_ones.params == on_zeros.params == {}
    assert on_ones.metrics == pytest.approx({"loss": loss_of(ones)}, rel=1e-5)
    assert on_zeros.metrics == pytest.approx({"loss": loss_of(zeros())}, rel=1e-5)
    for name, value in trained.params.items():
        np.testing.assert_array_equal(own.params[name], value)
    for name, value in trained_by_hand(ones, 1).items():
        np.testing.assert_allclose(again.params[name], value, rtol=1e-5)
    assert module.epochs == 2


@pytest.mark.parametrize(("restore", "steps"), [(True, 9), (False, 3)])
def test_the_optimizer_goes_on_or_begins_anew(here: AtHand, restore: bool, steps: int) -> None:  # noqa: F811
    for number in range(3):
        here.ask("train", zeros(), number)
    here.end()
    patched, module = trainer(), Line("Adam")
    flare.patch(patched, restore_state=restore)
    loop(module, patched)
    (optimizer,) = patched.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_steps_are_those_of_a_round(here: AtHand) -> None:  # noqa: F811
    for number in range(3):
        here.ask("train", zeros(), number)
    here.end()
    patched, module = trainer(max_epochs=-1, max_steps=2), Line()
    flare.patch(patched)
    loop(module, patched)
    assert len(here.results) == 3
    assert patched.global_step == 6


def test_after_the_last_round_the_trainer_is_the_scripts_own(here: AtHand) -> None:  # noqa: F811
    here.ask("train", zeros())
    here.ask("evaluate", zeros())
    here.end()
    patched, module = trainer(), Line()
    flare.patch(patched)
    loop(module, patched)
    before = module.line.weight.detach().clone()
    patched.fit(module, module.data(), module.data())
    assert not torch.equal(module.line.weight, before)
    assert len(here.results) == 2


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"line.weight": torch.zeros(3, 2), "line.bias": torch.zeros(1)}, r"line.weight has shape \(3, 2\) there"),
        ({"other": torch.zeros(1)}, r"none of its parameters \(other, ...\) is the module's"),
        ({"line.weight": torch.zeros(1, 2)}, r"only one of them has line.bias"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    here: AtHand,  # noqa: F811
    params: dict[str, torch.Tensor],
    said: str,
) -> None:
    here.ask("train", params)
    patched, module = trainer(), Line()
    flare.patch(patched)
    with pytest.raises(FederationError, match=said):
        loop(module, patched)


def test_part_of_a_model_is_loaded_where_that_is_wanted(here: AtHand) -> None:  # noqa: F811
    here.ask("train", {"line.weight": torch.zeros(1, 2), "elsewhere": torch.ones(1)})
    here.end()
    patched, module = trainer(max_epochs=0), Line()
    module.line.bias.data.fill_(7.0)
    flare.patch(patched, load_state_dict_strict=False)
    assert flare.is_running()
    patched.validate(module, module.data(), verbose=False)
    assert module.line.weight.tolist() == [[0.0, 0.0]]
    assert module.line.bias.tolist() == [7.0]


def test_a_script_that_fits_what_it_should_evaluate_is_told(here: AtHand) -> None:  # noqa: F811
    here.ask("evaluate", zeros())
    patched, module = trainer(), Line()
    flare.patch(patched)
    with pytest.raises(FederationError, match="validate before it trains"):
        loop(module, patched, validate=False)


def test_what_a_module_logs_goes_to_the_server(here: AtHand) -> None:  # noqa: F811
    here.ask("train", zeros())
    here.end()
    flare.init()
    patched, module = trainer(logger=flare.ClientLogger(prefix="site")), Line()
    flare.patch(patched)
    loop(module, patched)
    found = [(each.key, each.step) for each in here.metrics if each.key == "site-train_loss"]
    assert found == [("site-train_loss", 0), ("site-train_loss", 1), ("site-train_loss", 2)]


def test_fedprox_trains_on_its_proximal_loss(here: AtHand) -> None:  # noqa: F811
    start = zeros()
    here.ask("train", start, proximal_mu=2.0)
    here.end()
    patched, module = trainer(max_epochs=3), Line()
    flare.patch(patched)
    loop(module, patched)
    expected, plain = trained_by_hand(start, 3, mu=2.0), trained_by_hand(start, 3)
    for name, value in here.results[0].model.params.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)
        assert np.abs(expected[name] - plain[name]).max() > 1e-2


def test_scaffold_corrects_each_step_and_sends_the_change_of_its_variate(here: AtHand) -> None:  # noqa: F811
    start = zeros()
    common = [
        {"line.weight": np.array([[0.5, -0.25]], np.float32), "line.bias": np.array([1.0], np.float32)},
        {"line.weight": np.array([[-0.5, 0.75]], np.float32), "line.bias": np.array([0.25], np.float32)},
    ]
    for number, variate in enumerate(common):
        control = {f"scaffold/{name}": torch.from_numpy(value) for name, value in variate.items()}
        counted = {} if number == 0 else {"site-1": 0}
        here.ask("train", {**start, **control}, number, scaffold=True, scaffold_counted=counted)
    here.end()
    patched, module = trainer(max_epochs=2), Line()
    flare.patch(patched)
    loop(module, patched)
    own = {name: np.zeros_like(value) for name, value in common[0].items()}
    steps = 2 * ROWS // BATCH
    for variate, result in zip(common, here.results, strict=True):
        expected = trained_by_hand(start, 2, correction={name: variate[name] - own[name] for name in own})
        for name, value in expected.items():
            np.testing.assert_allclose(result.model.params[name], value, rtol=1e-5, atol=1e-7)
            # option II: c_i+ = c_i - c + (x - y) / (K * rate)
            change = (start[name].numpy() - value) / (steps * 0.05) - variate[name]
            np.testing.assert_allclose(result.model.params[f"scaffold/{name}"], change, rtol=1e-4, atol=1e-5)
            own[name] = own[name] + change


def test_scaffold_with_another_optimizer_is_refused(here: AtHand) -> None:  # noqa: F811
    control = {f"scaffold/{name}": value for name, value in zeros().items()}
    here.ask("train", {**zeros(), **control}, scaffold=True)
    patched, module = trainer(), Line("Adam")
    flare.patch(patched)
    with pytest.raises(FederationError, match=r"needs one torch\.optim\.SGD without momentum"):
        loop(module, patched)


def test_what_the_job_excludes_stays_at_the_site_over_a_restart_of_the_script(here: AtHand) -> None:  # noqa: F811
    here.ask("train", zeros(), exclude=["*.bias"])
    here.ask("train", {"line.weight": torch.ones(1, 2)}, 1, exclude=["*.bias"])
    here.end()
    patched, module = trainer(), Line()
    flare.patch(patched)
    assert flare.is_running()
    patched.fit(module, module.data(), module.data())
    assert set(here.results[0].model.params) == {"line.weight"}
    own = module.line.bias.detach().clone()
    # a script that is started again knows nothing of the one before but its files
    again, fresh = trainer(), Line()
    flare.patch(again)
    assert flare.is_running()
    again.validate(fresh, fresh.data(), verbose=False)
    assert fresh.line.bias.tolist() == own.tolist()
    assert fresh.line.weight.tolist() == [[1.0, 1.0]]


@pytest.mark.slow
def test_example_trains_in_a_process_of_its_own(site: ScriptSite) -> None:
    site.deploy(EXAMPLE.read_text(), initial="train.py:initial_model")
    model = site.initialize()
    accuracies = []
    for number in range(2):
        answer = site.train(
            type(model)(params=model.params, current_round=number, total_rounds=2),
        )
        accuracies.append(answer.metrics["accuracy"])
        assert set(answer.params) == set(model.params)
        model = answer
    final = site.evaluate(model).metrics["accuracy"]
    site.end()
    assert final > accuracies[0]
    assert {key for _, key, _, _ in site.metrics} >= {"train_loss"}
