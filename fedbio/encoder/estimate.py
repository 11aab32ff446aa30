"""Say beforehand how long embedding a file will take and what it needs, from a short measurement on this machine."""

from __future__ import annotations

__all__ = ["Estimate", "estimate_file", "operations"]

import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import RESIDUES
from fedbio.encoder.packs import ENDS, Plan
from fedbio.encoder.room import disk_bytes
from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.encoder.source import TEMPORARY_BYTES, Residues, Source, StrPath
from fedbio.encoder.work import Work, count_residues
from fedbio.encoder.workers import choose_devices
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
    pieces : int
        What the encoder computes: distinct sequences, of longer ones each window.
    seconds : float
        Time of inference on this machine, as busy as it is now.
    residues_per_second : float
        Over what the encoder sees of the proteins.
    memory_bytes, device_bytes, disk_bytes : int
        Peak memory of the process and of the accelerator, and room for temporary files, the parts and the file.
    file_bytes : int
        Of the finished file alone.
    device : str
    encoder : EncoderInfo
    """

    proteins: int
    residues: int
    longer: int
    pieces: int
    seconds: float
    residues_per_second: float
    memory_bytes: int
    device_bytes: int
    disk_bytes: int
    file_bytes: int
    device: str
    encoder: EncoderInfo


def estimate_file(
    source: StrPath,
    choice: EncoderChoice,
    *,
    folder: Path | None = None,
    labels: StrPath | None = None,
    classes: Sequence[str] = COMPARTMENTS,
    skip_invalid: bool = False,
) -> Estimate:
    """Measure a few packs of a file and conclude on the whole; nothing stays on the disk.

    Parameters
    ----------
    source : path-like
        Anything that `fedbio.proteins.read` reads.
    choice : EncoderChoice
        Of several devices, the first is measured.
    folder : Path, optional
        Where temporary files may be; by default the system's place for them.
    labels, classes, skip_invalid
        Passed to `fedbio.proteins.read`.
    """
    setup = Setup(choice)
    folder = folder or Path(tempfile.gettempdir())
    with Source(source, folder, labels=labels, classes=classes, skip_invalid=skip_invalid) as proteins:
        work = Work(proteins.distinct, setup.info, budget=setup.budget)
        devices = choose_devices(choice.device, work.residues)
        total = _measure(setup, work) / len(devices)
        info = setup.info
        rows = int(count_residues(proteins.lengths, info).sum()) if info.pooling == RESIDUES else len(proteins)
        temporary = int(proteins.distinct.lengths.sum(dtype=np.int64)) + TEMPORARY_BYTES * len(proteins)
        return Estimate(
            proteins=len(proteins),
            residues=proteins.residues,
            longer=proteins.longer_than(info.max_residues),
            pieces=int(work.pieces.sum()),
            seconds=total,
            residues_per_second=work.residues / total,
            memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            device_bytes=torch.cuda.max_memory_allocated(setup.device) if setup.device.type == "cuda" else 0,
            disk_bytes=temporary + disk_bytes(info, proteins=len(proteins), rows=rows, waiting=work.rows),
            file_bytes=disk_bytes(info, proteins=len(proteins), rows=rows, waiting=0),
            device=",".join(devices) if len(devices) > 1 else str(setup.device),
            encoder=info,
        )


def _measure(setup: Setup, work: Work) -> float:
    """Return the seconds that all packs would take on one device."""
    inference = setup.inference()
    inference.pack(*_pack(work, 0, 0.0))  # warms up, and holds the most memory
    done = seconds = 0.0
    blocks = np.unique(np.linspace(0, len(work.borders) - 2, _SAMPLE_PACKS).astype(int))
    # from the longest to the shortest pieces of blocks from the first to the last
    for number, share in zip(np.resize(blocks, _SAMPLE_PACKS).tolist(), np.linspace(0, 1, _SAMPLE_PACKS), strict=True):
        sequences, plan, pack = _pack(work, number, float(share))
        begun = time.perf_counter()
        inference.pack(sequences, plan, pack)
        seconds += time.perf_counter() - begun
        done += _cost(setup.config, (plan.end - plan.begin)[plan.packs[pack] : plan.packs[pack + 1]])
        if seconds > _SAMPLE_SECONDS:
            break
    lengths, longest = work.sequences.lengths, work.info.max_residues
    whole = _cost(setup.config, np.minimum(lengths, longest))
    more = int((work.pieces[lengths > longest] - 1).sum())
    return seconds * (whole + more * _cost(setup.config, np.array([longest]))) / done


def _pack(work: Work, block: int, share: float) -> tuple[Residues, Plan, int]:
    """Return what computing a pack takes: the one at this share of the way through its block."""
    planned = work.block(block)
    return planned.sequences, planned.plan, round(share * (len(planned.plan.packs) - 2))


def _cost(config: EncoderConfig, residues: NDArray[Any]) -> float:
    return float(operations(config, residues.astype(np.float64) + ENDS).sum())


def operations(config: EncoderConfig, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Floating-point operations for pieces of so many tokens: linear maps, and attention with its square."""
    linear = 2 * (4 * config.width**2 + 2 * config.width * config.ffn)
    operations: NDArray[np.float64] = config.layers * tokens * (linear + 4 * config.width * tokens)
    return operations
