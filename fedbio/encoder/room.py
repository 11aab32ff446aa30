"""See to it that there is room on the disk before anything is computed, and clear away what broken-off runs left."""

from __future__ import annotations

__all__ = ["check_room", "clear_leftovers", "disk_bytes"]

import logging
import re
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import RESIDUES
from fedbio.errors import MachineError
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)

_HEAD_BYTES = 200
"""Of each protein: id, length and digest in the file, and in the parts' record of what they are of."""
_SLACK_BYTES = 2**17


def disk_bytes(info: EncoderInfo, *, proteins: int, rows: int, waiting: int) -> int:
    """Return the room that embedding takes: the finished file of so many rows, and the parts that are still to come.

    Parameters
    ----------
    info : EncoderInfo
    proteins, rows : int
        What the finished file will hold.
    waiting : int
        Rows of the parts that are not there yet.
    """
    return 4 * info.width * (rows + waiting) + _HEAD_BYTES * proteins + _SLACK_BYTES


def check_room(target: Path, info: EncoderInfo, *, proteins: int, rows: NDArray[np.int64] | None, waiting: int) -> None:
    """Refuse work whose rows have no room on the disk, and announce the size of a file with a row per residue.

    Parameters
    ----------
    target : Path
        The embeddings file to be.
    info : EncoderInfo
    proteins : int
    rows : ndarray, shape (proteins,), int64, or None
        Rows of each protein, if there is one per residue.
    waiting : int
        Rows that are still to be computed.

    Raises
    ------
    MachineError
        Saying how much is needed and how much is free.
    """
    total = proteins if rows is None else int(rows.sum())
    needed = disk_bytes(info, proteins=proteins, rows=total, waiting=waiting)
    free = free_bytes(target.parent)
    if info.pooling == RESIDUES:
        log.info(
            "one row per residue rows=%d file_gib=%.2f needed_gib=%.2f free_gib=%.2f",
            total, 4 * info.width * total / 2**30, needed / 2**30, free / 2**30,
        )  # fmt: skip
    if needed > free:
        raise MachineError(
            f"{target}: needs {needed / 2**20:,.0f} MiB of disk for the file and the parts that it is made of, and "
            f"{free / 2**20:,.0f} MiB are free there; free some space or choose another disk, "
            "then run the same command again"
        )


def free_bytes(folder: Path) -> int:
    """Return the room on a folder's disk."""
    return shutil.disk_usage(folder).free


def clear_leftovers(target: Path) -> None:
    """Delete files that runs killed while they wrote the output have left; the caller holds its lock."""
    ours = re.compile(rf"\.{re.escape(target.name)}(\.kept\.h5)?\.\d+\.\d+\.part")
    for beside in target.parent.iterdir():
        if ours.fullmatch(beside.name):
            log.info("unfinished file of a killed run deleted file=%s", beside)
            beside.unlink(missing_ok=True)
