"""Hugging Face's Trainer in a federation: what `patch` makes of evaluate and train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fedbio.client.huggingface as flare
from fedbio.errors import FederationError

from .at_hand import AtHand, here  # noqa: F401
from .conftest import ScriptSite

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface" / "train.py"


class Rows(Dataset):
    """Sixteen short rows of tokens, whose class is the first one's parity."""

    def __init__(self) -> None:
        self.tokens = torch.randint(0, 8, (16, 4), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[place], "labels": self.tokens[place, 0] % 2}


def tiny(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=4,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "trainer"


def trainer(folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        **{
            "model": tiny(9),
            "args": args,
            "train_dataset": Rows(),
            "eval_dataset": Rows(),
            "compute_metrics": accuracy,
            **options,
        }
    )


def loop(patched: Trainer, *, evaluate: bool = True) -> None:
    """The usual script's loop."""
    while flare.is_running():
        flare.receive()
        if evaluate:
            patched.evaluate()
        patched.train()


def loss_of(params: dict[str, torch.Tensor]) -> float:
    model = tiny()
    model.load_state_dict(params)
    rows = Rows()
    with torch.no_grad():
        return float(model.eval()(input_ids=rows.tokens, labels=rows.tokens[:, 0] % 2).loss)


@pytest.mark.slow
def test_a_round_measures_what_was_received_and_trains_it(here: AtHand, folder: Path) -> None:  # noqa: F811
    starts = [tiny(seed).state_dict() for seed in (0, 1)]
    for number, start in enumerate(starts):
        here.ask("train", start, number)
    here.end()
    patched = trainer(folder)
    flare.patch(patched, restore_state=False)
    flare.patch(patched)
    loop(patched)
    assert len(here.results) == 2
    for start, result in zip(starts, here.results, strict=True):
        # what a trainer without a federation makes of the same model
        alone = trainer(folder, model=tiny())
        alone.model.load_state_dict(start)
        alone.train()
        assert result.model.metrics.keys() == {"eval_loss", "eval_accuracy"}
        assert result.model.metrics["eval_loss"] == pytest.approx(loss_of(start), rel=1e-5)
        assert set(result.model.params) == set(start)
        for name, value in alone.model.state_dict().items():
            np.testing.assert_allclose(result.model.params[name], value.numpy(), rtol=1e-5, atol=1e-6)


def test_an_evaluation_trains_nothing_and_leaves_the_sites_own_model(here: AtHand, folder: Path) -> None:  # noqa: F811
    for task, seed in (("train", 0), ("evaluate", 1), ("submit_model", None), ("train", 2)):
        here.ask(task, {} if seed is None else tiny(seed).state_dict())
    here.end()
    patched = trainer(folder)
    flare.patch(patched)
    loop(patched)
    trained, evaluated, own, again = (each.model for each in here.results)
    assert evaluated.params == {}
    assert evaluated.metrics["eval_loss"] == pytest.approx(loss_of(tiny(1).state_dict()), rel=1e-5)
    for name, value in trained.params.items():
        np.testing.assert_array_equal(own.params[name], value)
    assert again.params


@pytest.mark.parametrize(("restore", "steps"), [(True, 6), (False, 2)])
def test_the_optimizer_goes_on_or_begins_anew(
    here: AtHand,  # noqa: F811
    folder: Path,
    restore: bool,
    steps: int,
) -> None:
    for number in range(3):
        here.ask("train", tiny().state_dict(), number)
    here.end()
    patched = trainer(folder)
    flare.patch(patched, restore_state=restore)
    loop(patched)
    assert {int(state["step"]) for state in patched.optimizer.state.values()} == {steps}


def test_the_callback_alone_serves_a_script_that_only_trains(here: AtHand, folder: Path) -> None:  # noqa: F811
    here.ask("train", tiny().state_dict())
    here.ask("evaluate", tiny().state_dict())
    flare.init()
    patched = trainer(folder, callbacks=[flare.FLCallback()])
    patched.model.__fl_meta__ = {"NUM_STEPS_CURRENT_ROUND": 2}
    patched.train()
    (result,) = here.results
    assert result.model.metrics == {}
    assert result.model.meta["weight"] == 2
    with pytest.raises(FederationError, match="validate before it trains"):
        patched.train()


def test_fedprox_holds_the_model_near_to_the_one_that_was_received(here: AtHand, folder: Path) -> None:  # noqa: F811
    start = tiny().state_dict()
    for mu in (0.0, 5.0):
        here.ask("train", start, proximal_mu=mu)
    here.end()
    patched = trainer(folder)
    patched.args.optim, patched.args.lr_scheduler_type = "sgd", "constant"
    flare.patch(patched)
    loop(patched)
    free, held = (each.model.params for each in here.results)
    # two steps w1 = w0 - r g0, w2 = w1 - r (g1 + mu (w1 - w0)): the second is shorter by r mu (w1 - w0)
    one = trainer(folder, model=tiny())
    one.args.optim, one.args.lr_scheduler_type, one.args.max_steps = "sgd", "constant", 1
    one.train()
    for name, value in one.model.state_dict().items():
        shorter = 1e-2 * 5.0 * (value.numpy() - start[name].numpy())
        np.testing.assert_allclose(free[name] - held[name], shorter, rtol=1e-3, atol=5e-7)
    assert any(np.abs(free[name] - held[name]).max() > 1e-5 for name in free)


def test_what_a_trainer_logs_goes_to_the_server_on_one_axis_for_all_rounds(here: AtHand, folder: Path) -> None:  # noqa: F811
    for number in range(2):
        here.ask("train", tiny().state_dict(), number)
    here.end()
    flare.init()
    patched = trainer(folder, callbacks=[flare.ClientLogger()])
    patched.args.logging_steps = 1
    flare.patch(patched)
    loop(patched, evaluate=False)
    assert [(each.key, each.step) for each in here.metrics if each.key == "loss"] == [
        ("loss", step) for step in (1, 2, 3, 4)
    ]
    assert {each.key for each in here.metrics} == {"loss", "grad_norm", "learning_rate", "train_loss"}


def test_evaluations_within_a_training_and_of_several_sets_are_told_apart(here: AtHand, folder: Path) -> None:  # noqa: F811
    here.ask("train", tiny().state_dict())
    here.end()
    patched = trainer(folder, eval_dataset={"first": Rows(), "second": Rows()})
    patched.args.eval_strategy = "epoch"
    flare.patch(patched)
    loop(patched)
    (result,) = here.results
    names = {f"eval_{part}_{what}" for part in ("first", "second") for what in ("loss", "accuracy")}
    assert result.model.metrics.keys() == names
    assert result.model.metrics["eval_first_loss"] == pytest.approx(loss_of(tiny().state_dict()), rel=1e-5)


def test_after_the_last_round_the_trainer_is_the_scripts_own(here: AtHand, folder: Path) -> None:  # noqa: F811
    here.ask("evaluate", tiny().state_dict())
    here.end()
    patched = trainer(folder)
    flare.patch(patched)
    loop(patched)
    before = {name: value.clone() for name, value in patched.model.state_dict().items()}
    patched.train()
    assert patched.evaluate()["eval_loss"] > 0
    after = patched.model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert len(here.results) == 1


@pytest.mark.slow
def test_example_trains_in_a_process_of_its_own(site: ScriptSite) -> None:
    site.deploy(EXAMPLE.read_text(), initial="train.py:initial_model")
    model = site.initialize()
    accuracies = []
    for number in range(2):
        answer = site.train(type(model)(params=model.params, current_round=number, total_rounds=2))
        accuracies.append(answer.metrics["eval_accuracy"])
        assert set(answer.params) == set(model.params)
        model = answer
    final = site.evaluate(model).metrics["eval_accuracy"]
    site.end()
    assert final > accuracies[0]
