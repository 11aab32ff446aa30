"""Say beforehand how long embedding a file will take and what it needs, from a short measurement on this machine."""

from __future__ import annotations

__all__ = ["Estimate", "estimate_file", "operations"]

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedbio.compartments import COMPARTMENTS
from fedbio.encoder.packs import ENDS
from fedbio.encoder.setup import EncoderChoice, Setup, Source, StrPath
from fedbio.results import EncoderInfo
from fedbio.weights import EncoderConfig

_SAMPLE_PACKS = 5
_SAMPLE_SECONDS = 20.0


@dataclass(frozen=True)
class Estimate:
    """What embedding a file would take.

    Parameters
    ----------
    proteins, residues, longer : int
        What the source holds; `longer` proteins exceed what the encoder takes whole.
    seconds : float
        Time of inference on this machine, as busy as it is now.
    residues_per_second : float
        Over what the encoder sees of the proteins.
    memory_bytes, device_bytes, disk_bytes : int
        Peak memory of the process and of the accelerator, and room for the shards and the finished file.
    device : str
    encoder : EncoderInfo
    """

    proteins: int
    residues: int
    longer: int
    seconds: float
    residues_per_second: float
    memory_bytes: int
    device_bytes: int
    disk_bytes: int
    device: str
    encoder: EncoderInfo


def estimate_file(
    source: StrPath,
    choice: EncoderChoice,
    *,
    labels: StrPath | None = None,
    classes: Sequence[str] = COMPARTMENTS,
    skip_invalid: bool = False,
) -> Estimate:
    """Measure a few packs of a file and conclude on the whole; nothing is written.

    Parameters
    ----------
    source : path-like
        Anything that `fedbio.proteins.read` reads.
    choice : EncoderChoice
    labels, classes, skip_invalid
        Passed to `fedbio.proteins.read`.
    """
    setup = Setup(choice)
    proteins = Source(source, labels=labels, classes=classes, skip_invalid=skip_invalid)
    sequences = list(proteins.sequences.values())
    plan = setup.plan(sequences)
    inference = setup.inference()
    lengths = (plan.end - plan.begin + ENDS).astype(np.float64)
    cost = np.add.reduceat(operations(setup.config, lengths), plan.packs[:-1])
    inference.pack(sequences, plan, 0)  # warms up, and holds the most memory
    measured = seconds = 0.0
    for number in np.unique(np.linspace(0, len(cost) - 1, _SAMPLE_PACKS).astype(int)).tolist():
        begun = time.perf_counter()
        inference.pack(sequences, plan, number)
        seconds += time.perf_counter() - begun
        measured += float(cost[number])
        if seconds > _SAMPLE_SECONDS:
            break
    total = seconds * float(cost.sum()) / measured
    return Estimate(
        proteins=len(proteins.ids),
        residues=sum(proteins.lengths),
        longer=proteins.longer_than(setup.info.max_residues),
        seconds=total,
        residues_per_second=plan.residues / total,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device_bytes=torch.cuda.max_memory_allocated(setup.device) if setup.device.type == "cuda" else 0,
        disk_bytes=4 * setup.info.width * (len(plan.protein) + len(proteins.ids)),
        device=str(setup.device),
        encoder=setup.info,
    )


def operations(config: EncoderConfig, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Floating-point operations for pieces of so many tokens: linear maps, and attention with its square."""
    linear = 2 * (4 * config.width**2 + 2 * config.width * config.ffn)
    operations: NDArray[np.float64] = config.layers * tokens * (linear + 4 * config.width * tokens)
    return operations
