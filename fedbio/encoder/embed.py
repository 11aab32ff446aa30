"""Embed a file of proteins: read, plan, compute what is not there yet, and write the embeddings file whole."""

from __future__ import annotations

__all__ = ["EmbedReport", "embed_file"]

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import Embeddings, EmbeddingsWriter, check_same_encoder, write_embeddings
from fedbio.encoder.packs import Plan
from fedbio.encoder.rows import Assembly, KnownRows
from fedbio.encoder.setup import EncoderChoice, Setup, Source, StrPath
from fedbio.errors import DataError
from fedbio.files import exclusive_lock
from fedbio.progress import Progress
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_file` did, in counts.

    Parameters
    ----------
    proteins, residues : int
        What the source holds.
    cut, windowed : int
        Proteins longer than the encoder takes, by what was done with them.
    reused : int
        Proteins whose rows came from an earlier embeddings file.
    resumed : int
        Distinct sequences that an interrupted run had finished.
    seconds : float
        From loading the encoder to the finished file.
    encoder : EncoderInfo
    """

    proteins: int
    residues: int
    cut: int
    windowed: int
    reused: int
    resumed: int
    seconds: float
    encoder: EncoderInfo


def embed_file(
    source: StrPath,
    output: StrPath,
    *,
    encoder: StrPath = "esm1nv-44m",
    seed: int = 0,
    expected_sha256: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    long: Literal["cut", "window"] = "cut",
    batch_residues: int | None = None,
    threads: int | None = None,
    reuse: StrPath | None = None,
    label: str = "embedding",
    wait: bool = False,
    skip_invalid: bool = False,
    labels: StrPath | None = None,
    classes: Sequence[str] = COMPARTMENTS,
) -> EmbedReport:
    """Embed every protein of a file; a call that was broken off goes on where it was.

    Parameters
    ----------
    source : path-like
        Anything that `fedbio.proteins.read` reads.
    output : path-like
        The embeddings file to make; if it is there and holds these proteins, nothing is done.
    encoder : str or path-like
        A built-in architecture, an encoder folder, or a fair-esm file.
    seed : int
        Of the random weights of a built-in architecture.
    expected_sha256 : str, optional
        Digest that the weights must have.
    dtype, device : str
        See `fedbio.encoder.inference`.
    long : {"cut", "window"}
        What to do with proteins longer than the encoder takes: use their beginning, or average overlapping windows.
    batch_residues : int, optional
        The most tokens in a pack, by default `fedbio.encoder.setup.BATCH_RESIDUES`. Part of the plan: another number
        may change the last bits of the result.
    threads : int, optional
        CPU threads; by default as many as this process may use.
    reuse : path-like, optional
        An embeddings file of the same encoder whose rows are taken for the sequences that it holds.
    label : str
        What the progress line says.
    wait : bool
        Wait for another process that works on `output`, instead of refusing.
    skip_invalid, labels, classes
        Passed to `fedbio.proteins.read`.

    Returns
    -------
    EmbedReport

    Raises
    ------
    RefusedError
        If the weights have another digest than `expected_sha256`.
    DataError
        If `output` or `reuse` were made with another encoder, or `output` holds other proteins.
    MachineError
        If another process works on `output`, the disk is full, or the device is missing.
    """
    started = time.perf_counter()
    target = Path(output)
    setup = Setup(EncoderChoice(encoder, seed, expected_sha256, dtype, device, long, batch_residues, threads))
    proteins = Source(source, labels=labels, classes=classes, skip_invalid=skip_invalid)
    longer = proteins.longer_than(setup.info.max_residues)
    if longer:
        what = "cut to" if long == "cut" else "averaged over windows of"
        log.warning(
            "long proteins %s %d residues proteins=%d of=%d", what, setup.info.max_residues, longer, len(proteins.ids)
        )
    with exclusive_lock(target.with_name(f".{target.name}.lock"), str(target), wait=wait):
        if target.exists() and _is_finished(target, proteins, setup.info, reuse):
            log.info("nothing to do, these proteins are embedded file=%s", target)
            reused, resumed = len(proteins.ids), 0
        else:
            reused, resumed = _embed(target, setup, proteins, reuse, label)
    return EmbedReport(
        proteins=len(proteins.ids),
        residues=sum(proteins.lengths),
        cut=longer if long == "cut" else 0,
        windowed=longer if long == "window" else 0,
        reused=reused,
        resumed=resumed,
        seconds=time.perf_counter() - started,
        encoder=setup.info,
    )


def _is_finished(target: Path, proteins: Source, info: EncoderInfo, reuse: StrPath | None) -> bool:
    with Embeddings.open(target) as there:
        check_same_encoder(there.info, info, where=str(target), remedy="give another output, or delete this one")
        if proteins.is_in(there):
            # a run that was killed after its last step left them
            shutil.rmtree(EmbeddingsWriter.folder_of(target), ignore_errors=True)
            return True
    if reuse is not None and target.samefile(reuse):
        return False
    raise DataError(
        f"{target}: holds the embeddings of other proteins; give another output, "
        f"or reuse {target} itself (--reuse) to keep the rows that fit"
    )


def _embed(target: Path, setup: Setup, proteins: Source, reuse: StrPath | None, label: str) -> tuple[int, int]:
    """Make the embeddings file; returns how many proteins were reused and how many sequences resumed."""
    with KnownRows(reuse, setup.info) as known:
        fresh = [digest for digest in proteins.sequences if digest not in known.places]
        sequences = [proteins.sequences[digest] for digest in fresh]
        plan = setup.plan(sequences)
        writer = EmbeddingsWriter(target, info=setup.info, work=_name_work(fresh, setup.budget), rows=len(plan.protein))
        resumed = writer.done
        if resumed < len(plan.protein):
            _compute(setup, sequences, plan, writer, label)
        write_embeddings(
            target,
            info=setup.info,
            ids=proteins.ids,
            lengths=proteins.lengths,
            digests=proteins.digests,
            blocks=Assembly(fresh, plan, writer, known).blocks(proteins.digests),
        )
        writer.remove()
        return sum(digest in known.places for digest in proteins.digests), len(np.unique(plan.protein[:resumed]))


def _name_work(digests: Sequence[bytes], budget: int) -> str:
    """Name a piece of work by all that its vectors and their order depend on, besides the encoder."""
    return hashlib.sha256(b"packs 1 %d " % budget + b"".join(digests)).hexdigest()


def _compute(setup: Setup, sequences: Sequence[bytes], plan: Plan, writer: EmbeddingsWriter, label: str) -> None:
    """Compute the packs that the writer does not hold yet; it holds whole packs only."""
    inference = setup.inference()
    residues = plan.end - plan.begin
    with Progress(label, total=plan.residues, unit="residues") as progress:
        progress.advance(int(residues[: writer.done].sum()))
        for number in range(int(np.searchsorted(plan.packs, writer.done)), len(plan.packs) - 1):
            writer.append(inference.pack(sequences, plan, number))
            progress.advance(int(residues[plan.packs[number] : plan.packs[number + 1]].sum()))
        writer.flush()
