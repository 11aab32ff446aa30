"""Two parts of a network on either side of a queue: the gradients of the whole, and messages that do not fit."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbio.client.split import train_bottom, train_top
from fedbio.errors import FederationError

# torch makes a folder for its cache with the first optimizer, and not in the middle of a test
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()


class Sides:
    """Passes messages from one thread to another by number; `change` may alter them."""

    def __init__(self, change: Any = lambda number, items: items) -> None:
        self.items: dict[int, dict[str, np.ndarray]] = {}
        self.changed = threading.Condition()
        self.change = change

    def send(self, number: int, items: dict[str, np.ndarray]) -> None:
        with self.changed:
            # what is sent is sent: later changes of the tensors do not show
            self.items[number] = {name: value.copy() for name, value in self.change(number, items).items()}
            self.changed.notify_all()

    def receive(self, number: int) -> dict[str, np.ndarray]:
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.items, 20)
            return self.items.pop(number)


class Fork(nn.Module):
    """Gives two tensors and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": self.a(x), "b": self.b(x).double(), "mask": x[:, 0] > 0}


class Join(nn.Module):
    """Uses one of them where the mask says so; never the other."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(given["mask"][:, None], self.last(given["a"]), self.last(-given["a"]))


def both(bottom: nn.Module, top: nn.Module, x: torch.Tensor, y: torch.Tensor, sides: Sides | None = None) -> float:
    """Train both parts for one step, each on a thread of its own; raise what the bottom part raises."""
    sides = sides or Sides()
    losses: list[float] = []

    def above() -> None:
        optimizer = torch.optim.SGD(top.parameters(), lr=0.1)
        losses.append(train_top(top, optimizer, nn.functional.cross_entropy, y, sides, 0))

    thread = threading.Thread(target=above, daemon=True)
    thread.start()
    trainable = [each for each in bottom.parameters() if each.requires_grad] or [torch.zeros(1, requires_grad=True)]
    train_bottom(bottom, torch.optim.SGD(trainable, lr=0.1), x, sides, 0)
    thread.join(20)
    return losses[0]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 1, 0, 1, 0])


def test_several_tensors_and_a_mask_go_through_the_cut() -> None:
    torch.manual_seed(0)
    bottom, top = Fork(), Join()
    x, y = batch()
    loss = nn.functional.cross_entropy(top(bottom(x)), y)
    loss.backward()
    expected = [*bottom.a.parameters(), *top.parameters()]
    gradients = [each.grad.clone() for each in expected]
    assert both(bottom, top, x, y) == pytest.approx(float(loss.detach()))
    for parameter, gradient in zip(expected, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6)
    # a tensor that the other part does not use has gradients of zero
    assert all(float(each.grad.abs().sum()) == 0 for each in bottom.b.parameters())


def test_frozen_bottom_stays_as_it_is_and_the_top_learns() -> None:
    bottom, top = nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2)
    before = bottom.weight.clone(), top.weight.detach().clone()
    both(bottom, top, *batch())
    assert torch.equal(bottom.weight, before[0])
    assert not torch.equal(top.weight, before[1])


@pytest.mark.parametrize(
    ("gradients", "reason"),
    [
        ({}, r"gradients came for \[\], expected them for \['activations'\]"),
        ({"activations": np.zeros((6, 2), np.float32)}, r"shape \(6, 2\), expected torch.float32 and \(6, 3\)"),
        ({"activations": np.zeros((6, 3), np.float64)}, "torch.float64 and shape"),
        ({"activations": np.full((6, 3), np.nan, np.float32)}, "are not finite"),
    ],
)
def test_gradients_that_do_not_fit_change_nothing(gradients: dict[str, np.ndarray], reason: str) -> None:
    bottom = nn.Linear(4, 3)
    before = bottom.weight.detach().clone()
    sides = Sides()
    sides.items[1] = gradients
    with pytest.raises(FederationError, match=reason):
        train_bottom(bottom, torch.optim.SGD(bottom.parameters(), lr=0.1), batch()[0], sides, 0)
    assert torch.equal(bottom.weight, before)


@pytest.mark.parametrize(
    ("activations", "reason"),
    [
        ({}, "no activations came"),
        ({"activations": np.zeros((5, 3), np.float32)}, r"shape \(5, 3\) came for a batch of 6 rows"),
        ({"activations": np.zeros((), np.float32)}, "came for a batch of 6 rows"),
        ({"activations": np.full((6, 3), np.inf, np.float32)}, "are not finite"),
    ],
)
def test_activations_that_do_not_fit_change_nothing(activations: dict[str, np.ndarray], reason: str) -> None:
    top = nn.Linear(3, 2)
    before = top.weight.detach().clone()
    sides = Sides()
    sides.items[0] = activations
    with pytest.raises(FederationError, match=reason):
        train_top(top, torch.optim.SGD(top.parameters(), lr=0.1), nn.functional.cross_entropy, batch()[1], sides, 0)
    assert torch.equal(top.weight, before)
    assert 1 not in sides.items


def test_loss_that_is_no_number_is_refused() -> None:
    top, sides = nn.Linear(3, 2), Sides()
    sides.items[0] = {"activations": np.zeros((6, 3), np.float32)}
    with pytest.raises(FederationError, match="the loss of batch 0 is"):
        train_top(
            top, torch.optim.SGD(top.parameters(), lr=0.1), lambda output, y: output.sum() * torch.nan,
            batch()[1], sides, 0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda x: x.bfloat16(), "activations of torch.bfloat16 cannot travel"),
        (lambda x: [x], "must return a tensor, or a dict of tensors"),
    ],
)
def test_activations_that_cannot_travel_are_refused(module: Any, reason: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(FederationError, match=reason):
        train_bottom(module, optimizer, batch()[0], Sides(), 0)
