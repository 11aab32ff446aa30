"""Trainers of Lightning and Hugging Face under torchrun: two ranks train one model, and one of them talks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedbio.federation import FLModel

from .conftest import ScriptSite, wait_until

LIGHTNING = """
import lightning, torch, torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
import fedbio.client.lightning as flare

class Line(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1, bias=False)
    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])
    def training_step(self, batch):
        return self.loss(batch)
    def validation_step(self, batch):
        self.log("loss", self.loss(batch), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.125)

if __name__ == "__main__":
    dist.init_process_group("gloo")
    # each rank has the half of the data: targets 1 and 3 of the input 1
    data = DataLoader(TensorDataset(torch.ones(2, 1), torch.tensor([[1.0], [3.0]])), 1)
    model = Line()
    trainer = lightning.Trainer(strategy="ddp", devices=2, accelerator="cpu", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    flare.patch(trainer)
    while flare.is_running():
        received = flare.receive()
        print(f"rank {dist.get_rank()} has {float(received.params['line.weight'])}", flush=True)
        trainer.validate(model, data, verbose=False)
        trainer.fit(model, data)
        print(f"rank {dist.get_rank()} made {float(model.line.weight)}", flush=True)
"""

HUGGING_FACE = """
import torch, torch.distributed as dist
from transformers import Trainer, TrainingArguments
import fedbio.client.huggingface as flare

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1, bias=False)
    def forward(self, x, labels):
        out = self.line(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}

class Two(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, place):
        return {"x": torch.ones(1), "labels": torch.tensor([1.0, 3.0])[place : place + 1]}

if __name__ == "__main__":
    arguments = TrainingArguments(output_dir="trainer", num_train_epochs=1, per_device_train_batch_size=1,
        per_device_eval_batch_size=1, learning_rate=0.125, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, ddp_backend="gloo")
    model = Line()
    trainer = Trainer(model=model, args=arguments, train_dataset=Two(), eval_dataset=Two())
    flare.patch(trainer)
    while flare.is_running():
        received = flare.receive()
        print(f"rank {dist.get_rank()} has {float(received.params['line.weight'])}", flush=True)
        trainer.evaluate()
        trainer.train()
        print(f"rank {dist.get_rank()} made {float(model.line.weight)}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "metric"), [(LIGHTNING, "loss"), (HUGGING_FACE, "eval_loss")])
def test_two_ranks_train_one_model_with_the_mean_of_their_gradients(site: ScriptSite, script: str, metric: str) -> None:
    site.deploy(script, launch="torchrun", processes=2, idle_s=120)
    weight = np.zeros((1, 1), np.float32)
    for number, (loss, after) in enumerate([(5.0, 0.5), (3.25, 0.875)]):
        answer = site.train(FLModel(params={"line.weight": weight}, current_round=number, total_rounds=2))
        # a step of the mean gradient over both ranks: 0.125 * 2 * (2 - weight)
        assert answer.params["line.weight"].tolist() == [[after]]
        # of the model that came, over the data of both
        assert answer.metrics[metric] == pytest.approx(loss)
        weight = answer.params["line.weight"]
    assert site.evaluate(FLModel(params={"line.weight": weight}, current_round=2)).metrics[metric] == pytest.approx(
        (0.125**2 + 2.125**2) / 2
    )
    site.end()
    for has, made in [(0.0, 0.5), (0.5, 0.875)]:
        for rank in (0, 1):
            assert f"rank {rank} has {has}" in site.log
            assert f"rank {rank} made {made}" in site.log


LONG_ROUNDS = """
import datetime, torch.distributed as dist
import fedbio.client as flare, fedbio.client.session

if __name__ == "__main__":
    fedbio.client.session.BEAT_S = 0.5
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
    flare.init()
    assert flare.receive(timeout=1.2) is None
    print("nothing yet", flush=True)
    while flare.is_running():
        model = flare.receive()
        flare.send(flare.FLModel(params=model.params))
    print(f"rank {dist.get_rank()} is done", flush=True)  # in one piece: both ranks write to one log
"""


@pytest.mark.slow
def test_ranks_wait_longer_for_their_next_task_than_their_collectives_would(site: ScriptSite) -> None:
    site.deploy(LONG_ROUNDS, launch="torchrun", processes=2, idle_s=60)
    site.scripts.of("job-1", site.context).start()
    wait_until(lambda: site.log.count("nothing yet") == 2, 60)
    time.sleep(5)
    ones = FLModel(params={"w": np.ones(2, np.float32)})
    assert site.train(ones).params["w"].tolist() == [1, 1]
    site.end()
    assert "rank 0 is done" in site.log
    assert "rank 1 is done" in site.log
