"""Write the proteins of a large file as shards: FASTA files of about as many residues each, in the file's order."""

from __future__ import annotations

__all__ = ["Shard", "write_shards"]

import array
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedbio.compartments import COMPARTMENTS
from fedbio.encoder.shards import plan_shards
from fedbio.errors import DataError
from fedbio.progress import Progress
from fedbio.proteins import Protein, ReadCounts, read, write_fasta


@dataclass(frozen=True)
class Shard:
    """One of the files.

    Parameters
    ----------
    path : Path
    proteins, residues : int
        What it holds.
    """

    path: Path
    proteins: int
    residues: int


def write_shards(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    shards: int,
    *,
    labels: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = COMPARTMENTS,
    skip_invalid: bool = False,
    counts: ReadCounts | None = None,
) -> list[Shard]:
    """Write ``FOLDER/K-of-N.fasta`` for K from 1 to N; read one after another they are the file.

    Parameters
    ----------
    source : path-like
        Anything that `fedbio.proteins.read` reads.
    folder : path-like
        Where the shards shall be; each appears whole.
    shards : int
        How many, N.
    labels, classes, skip_invalid
        Passed to `fedbio.proteins.read`; labels are written into the headers.
    counts : ReadCounts, optional
        What was read leniently or left out.

    Raises
    ------
    DataError
        If there are fewer proteins than shards, or the file changes while it is read.

    Notes
    -----
    The file is read twice, first for the lengths and then for the sequences, so that memory holds no sequence but one.
    The same file gives the same shards, byte for byte.
    """
    tally = ReadCounts() if counts is None else counts

    def proteins(counts: ReadCounts) -> Iterator[Protein]:
        return read(source, labels=labels, classes=classes, skip_invalid=skip_invalid, counts=counts)

    lengths = np.frombuffer(array.array("q", (len(each.sequence) for each in proteins(tally))), dtype=np.int64)
    if not 1 <= shards <= len(lengths):
        raise DataError(
            f"{source}: {len(lengths):,} proteins cannot make {shards:,} shards; ask for 1 to {len(lengths):,}"
        )
    written = []
    with Progress("writing shards", total=len(lengths), unit="proteins") as progress:
        rest = proteins(ReadCounts())
        for number, places in enumerate(plan_shards(lengths, shards), start=1):
            path = Path(folder) / f"{number}-of-{shards}.fasta"
            here = lengths[places.start : places.stop]
            written.append(Shard(path, write_fasta(_as_planned(rest, here, source), path), int(here.sum())))
            progress.advance(len(places))
    if next(rest, None) is not None:
        raise _changed(source)
    return written


def _as_planned(
    proteins: Iterator[Protein], lengths: NDArray[np.int64], source: str | os.PathLike[str]
) -> Iterator[Protein]:
    for length in lengths.tolist():
        protein = next(proteins, None)
        if protein is None or len(protein.sequence) != length:
            raise _changed(source)
        yield protein


def _changed(source: str | os.PathLike[str]) -> DataError:
    return DataError(f"{source}: changed while it was read; wait until it is written, and run the same command again")
