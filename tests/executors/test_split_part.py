"""A part of a split network goes on from its checkpoint as if there had been no break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedbio.errors import FederationError, FormatError
from fedbio.executors.split_part import Part
from fedbio.tensors import write_file

OPTIMIZERS = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda module: torch.optim.Adam(module.parameters(), lr=0.1),
    "adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1, amsgrad=True),
    "adagrad": lambda module: torch.optim.Adagrad(module.parameters(), lr=0.1),
}


def part(folder: Path, optimizer: str = "adam", run: str = "r") -> Part:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return Part(folder, run, module, OPTIMIZERS[optimizer](module))


def train(which: Part, steps: int = 3) -> None:
    which.module.train()
    for step in range(steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * which.epoch + step))
        which.optimizer.zero_grad()
        which.module(x).square().sum().backward()
        which.optimizer.step()
    which.epoch += 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    unbroken, first, second = (part(tmp_path, optimizer) for _ in range(3))
    train(unbroken)
    train(unbroken)
    train(first)
    first.save()
    second.load(1)
    train(second)
    for name, value in unbroken.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    one = part(tmp_path)
    for _ in range(4):
        train(one, 1)
        one.save()
    names = sorted(path.name for path in tmp_path.glob("*"))
    assert names == ["epoch-00003.safetensors", "epoch-00004.safetensors"]
    one.finish(tmp_path / "part.safetensors")
    one.finish(tmp_path / "part.safetensors")
    assert sorted(path.name for path in tmp_path.glob("*")) == ["epoch-00004.safetensors", "part.safetensors"]


def test_checkpoint_that_is_not_there_or_of_another_run_is_not_taken(tmp_path: Path) -> None:
    one = part(tmp_path)
    with pytest.raises(FederationError, match="no checkpoint of epoch 1"):
        one.load(1)
    train(one)
    one.save()
    with pytest.raises(FederationError, match="of another run"):
        part(tmp_path, run="other").load(1)
    write_file(tmp_path / "epoch-00002.safetensors", {"module/x": np.zeros(1)})
    with pytest.raises(FormatError, match="not a checkpoint"):
        one.load(2)


def test_checkpoint_of_another_network_is_not_taken(tmp_path: Path) -> None:
    one = part(tmp_path)
    train(one)
    one.save()
    module = nn.Linear(2, 2)
    with pytest.raises(FederationError, match="does not fit the part of the script"):
        Part(tmp_path, "r", module, OPTIMIZERS["adam"](module)).load(1)


def test_optimizer_that_keeps_objects_is_refused(tmp_path: Path) -> None:
    one = part(tmp_path)
    train(one)
    one.optimizer.param_groups[0]["hook"] = object()
    with pytest.raises(FederationError, match="Adam keeps what cannot be written without a pickle"):
        one.save()
    assert not list(tmp_path.glob("epoch-*"))
