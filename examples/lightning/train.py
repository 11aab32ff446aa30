"""A Lightning script made federated by three lines: the import, `patch`, and the loop.

Each site makes points of two classes of its own; replace `Points` by your data.
"""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import fedbio.client.lightning as flare


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        features, labels = batch
        loss = torch.nn.functional.cross_entropy(self.layers(features), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        features, labels = batch
        logits = self.layers(features)
        self.log("loss", torch.nn.functional.cross_entropy(logits, labels))
        self.log("accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Points(lightning.LightningDataModule):
    """Points of two classes, moved along by a site's own vector."""

    def __init__(self, site: str) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(sum(site.encode()))
        labels = torch.arange(120) % 2
        centres = torch.tensor([[1.0, -1.0, 0.5, 0.0], [-1.0, 1.0, 0.0, 0.5]])
        features = (
            centres[labels] + 0.8 * torch.randn(120, 4, generator=random) + 0.2 * torch.randn(4, generator=random)
        )
        self.training = TensorDataset(features[:80], labels[:80])
        self.validation = TensorDataset(features[80:], labels[80:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=40)


def initial_model() -> torch.nn.Module:
    """Return the model that all sites begin with; one site is asked for it."""
    torch.manual_seed(0)
    return Classifier()


def main() -> None:
    flare.init()
    torch.manual_seed(0)
    model, points = Classifier(), Points(flare.get_site_name())
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=flare.ClientLogger(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    flare.patch(trainer)
    while flare.is_running():
        received = flare.receive()
        print(f"round {received.current_round} of {received.total_rounds}")
        trainer.validate(model, datamodule=points)
        trainer.fit(model, datamodule=points)


if __name__ == "__main__":
    main()
