"""Write what was learnt as an encoder folder, with an account of how it came about."""

from __future__ import annotations

__all__ = ["write_encoder"]

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from fedbio import __version__
from fedbio.encoder.pretraining.checkpoints import Progress
from fedbio.encoder.pretraining.corpus import CorpusFacts
from fedbio.encoder.pretraining.recipe import Recipe
from fedbio.files import write_whole
from fedbio.training_account import TRAINING_FILE
from fedbio.weights import Weights, weights_digest, write_weights

if TYPE_CHECKING:
    from fedbio.encoder.pretraining.run import Start


def write_encoder(
    folder: Path,
    start: Start,
    recipe: Recipe,
    weights: Weights,
    corpus: CorpusFacts,
    progress: Progress,
    *,
    finished: bool,
    parameters: int,
) -> str:
    """Write architecture, weights with head, and ``training.json``; return the weights' digest.

    Files in the account are named without their folders: where proteins lie is nobody else's matter.
    """
    config = msgspec.structs.replace(start.config, trained=True)
    write_weights(folder, config, weights)
    digest = weights_digest(weights)
    account: dict[str, Any] = {
        "format": "fedbio-training",
        "version": 1,
        "encoder": config.name,
        "weights_sha256": digest,
        "parameters": parameters,
        "finished": finished,
        "from": start.name,
        "step": progress.step,
        "tokens": progress.tokens,
        "masked_residues": progress.masked,
        "seconds": round(progress.seconds, 1),
        "recipe": recipe,
        "corpus": corpus,
        "curve": progress.curve,
        "stretches": progress.stretches,
        "software": {
            "fedbio": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    write_whole(folder / TRAINING_FILE, msgspec.json.format(msgspec.json.encode(account), indent=2) + b"\n")
    return digest
