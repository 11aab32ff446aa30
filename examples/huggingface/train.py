"""A Hugging Face script made federated by three lines: the import, `patch`, and the loop.

A tiny BERT, made on the fly, learns to tell sequences rich in one of two sets of residues; replace `Sequences` by your
data and `initial_model` by ``from_pretrained``.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fedbio.client.huggingface as flare

RESIDUES = 20
LENGTH = 24


class Sequences(torch.utils.data.Dataset):
    """Random sequences; those of class 1 have the second half of the alphabet more often."""

    def __init__(self, site: str, split: str, count: int) -> None:
        random = torch.Generator().manual_seed(sum(f"{site} {split}".encode()))
        self.labels = torch.arange(count) % 2
        preference = torch.ones(2, RESIDUES)
        preference[0, : RESIDUES // 2] = preference[1, RESIDUES // 2 :] = 4
        rows = [torch.multinomial(preference[label], LENGTH, True, generator=random) for label in self.labels]
        self.tokens = torch.stack(rows) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[place], "labels": self.labels[place]}


def initial_model() -> torch.nn.Module:
    """Return the model that all sites begin with; one site is asked for it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=RESIDUES + 1,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    flare.init()
    site = flare.get_site_name()
    trainer = Trainer(
        model=initial_model(),
        args=TrainingArguments(
            output_dir="trainer",
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Sequences(site, "train", 96),
        eval_dataset=Sequences(site, "validation", 48),
        compute_metrics=accuracy,
        callbacks=[flare.ClientLogger()],
    )
    flare.patch(trainer)
    while flare.is_running():
        received = flare.receive()
        print(f"round {received.current_round} of {received.total_rounds}")
        trainer.evaluate()
        trainer.train()


if __name__ == "__main__":
    main()
