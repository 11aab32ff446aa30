"""A PyTorch classifier, made federated by five lines: those with a number behind them.

Each site makes embeddings of two locations of its own; replace `load_data` by your data.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedbio.client as flare  # 1

WIDTH = 16


def load_data(site: str) -> tuple[TensorDataset, TensorDataset]:
    """Return 80 vectors of two locations to train on and 40 to validate with, moved along by a site's own vector."""
    random = torch.Generator().manual_seed(sum(site.encode()))
    labels = torch.arange(120) % 2
    centres = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    features = centres[labels] + torch.randn(120, WIDTH, generator=random) + 0.2 * torch.randn(WIDTH, generator=random)
    return TensorDataset(features[:80], labels[:80]), TensorDataset(features[80:], labels[80:])


def initial_model() -> nn.Module:
    """Return the model that all sites begin with; one site is asked for it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


def main() -> None:
    flare.init()  # 2
    training, validation = load_data(flare.get_site_name())
    model = initial_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    while flare.is_running():  # 3
        received = flare.receive()  # 4
        model.load_state_dict(received.params)
        model.eval()
        features, labels = validation.tensors
        with torch.no_grad():
            accuracy = (model(features).argmax(1) == labels).float().mean().item()
        print(f"round {received.current_round} of {received.total_rounds}: accuracy {accuracy:.3f}")
        model.train()
        for features, labels in DataLoader(training, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict(), metrics={"accuracy": accuracy}))  # 5


if __name__ == "__main__":
    main()
