"""The examples whose loops are a trainer's, as a reader runs them; what they log is in TensorBoard's files."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from .conftest import SITES, Parties
from .test_examples import run_example


@pytest.mark.slow
@pytest.mark.parametrize(("example", "metric"), [("lightning", "accuracy"), ("huggingface", "eval_accuracy")])
def test_example_of_a_trainer_gets_better_and_is_measured(parties: Parties, example: str, metric: str) -> None:
    run_example(parties, example)
    server = parties.folder / "server"
    events = [json.loads(line) for line in (server / "events.jsonl").read_text().splitlines()]
    rounds = [each for each in events if each["event"] == "round"]
    assert [each["round"] for each in rounds] == [0, 1, 2]
    assert rounds[-1]["metrics"][metric] > rounds[0]["metrics"][metric]
    assert (
        load_file(server / "models/fedavg/best.safetensors").keys()
        == load_file(server / "models/fedavg/last.safetensors").keys()
    )
    tracked = [json.loads(line) for line in (server / "tracking.jsonl").read_text().splitlines()]
    assert {each["site"] for each in tracked if each["key"] in ("train_loss", "loss")} == set(SITES)
    for site in SITES:
        assert list((server / "tensorboard" / "fedavg" / site).glob("events.out.tfevents.*"))
