"""Say beforehand how long embedding a file will take and what it needs, from a short measurement on this machine."""

from __future__ import annotations

__all__ = ["Estimate", "estimate_file", "operations"]

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
from fedbio.encoder.memory import grown_bytes
from fedbio.encoder.packs import ENDS
from fedbio.encoder.room import disk_bytes
from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.encoder.source import TEMPORARY_BYTES, Source, StrPath
from fedbio.encoder.work import Work, count_residues
from fedbio.encoder.workers import choose_devices
from fedbio.results import EncoderInfo
from fedbio.weights import EncoderConfig

_SAMPLE_BLOCKS = 2
_SAMPLE_PACKS = 8
_SAMPLE_SECONDS = 10.0


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
        Memory that the processes may take (what ``--memory`` is held against), the accelerator's peak for the packs
        that were measured, and room for temporary files, the parts and the file.
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
        # processes on the CPU share the threads that were measured
        total = _measure(setup, work) / (1 if setup.device.type == "cpu" else len(devices))
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
            memory_bytes=grown_bytes(len(proteins), setup.needed_bytes) * len(devices),
            device_bytes=torch.cuda.max_memory_allocated(setup.device) if setup.device.type == "cuda" else 0,
            disk_bytes=temporary + disk_bytes(info, proteins=len(proteins), rows=rows, waiting=work.rows),
            file_bytes=disk_bytes(info, proteins=len(proteins), rows=rows, waiting=0),
            device=",".join(devices) if len(devices) > 1 else str(setup.device),
            encoder=info,
        )


def _measure(setup: Setup, work: Work) -> float:
    """Return the seconds that all packs would take on one device."""
    inference = setup.inference()
    done = seconds = 0.0
    for number in np.unique(np.linspace(0, len(work.borders) - 2, _SAMPLE_BLOCKS).astype(int)).tolist():
        block = work.block(number)
        plan, count = block.plan, len(block.plan.packs) - 1
        inference.pack(block.sequences, plan, 0)  # warms up, and holds the most memory
        # from the longest pieces to the shortest
        packs = np.unique(np.linspace(0, count - 1, _SAMPLE_PACKS).astype(int)).tolist()
        begun = time.perf_counter()
        for pack, _ in zip(packs, inference.packs(block.sequences, plan, packs), strict=True):
            done += _cost(setup.config, (plan.end - plan.begin)[plan.packs[pack] : plan.packs[pack + 1]])
            if time.perf_counter() - begun > _SAMPLE_SECONDS:
                break
        seconds += time.perf_counter() - begun
    lengths, longest = work.sequences.lengths, work.info.max_residues
    whole = _cost(setup.config, np.minimum(lengths, longest))
    more = int((work.pieces[lengths > longest] - 1).sum())
    return seconds * (whole + more * _cost(setup.config, np.array([longest]))) / done


def _cost(config: EncoderConfig, residues: NDArray[Any]) -> float:
    return float(operations(config, residues.astype(np.float64) + ENDS).sum())


def operations(config: EncoderConfig, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Floating-point operations for pieces of so many tokens: linear maps, and attention with its square."""
    linear = 2 * (4 * config.width**2 + 2 * config.width * config.ffn)
    operations: NDArray[np.float64] = config.layers * tokens * (linear + 4 * config.width * tokens)
    return operations
