"""Embed a file of proteins: read, plan, compute what is not there yet, and write the embeddings file whole."""

from __future__ import annotations

__all__ = ["EmbedReport", "embed_file"]

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedbio.compartments import COMPARTMENTS
from fedbio.embeddings import RESIDUES, Embeddings, Parts, check_same_encoder, write_stream
from fedbio.encoder.compute import compute
from fedbio.encoder.memory import check_memory
from fedbio.encoder.pooling import Pooling
from fedbio.encoder.room import check_room, clear_leftovers
from fedbio.encoder.rows import Assembly, KnownRows
from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.encoder.source import Source, StrPath
from fedbio.encoder.unfinished import check_kept, forget, forget_within, keep_rows, kept_file, record
from fedbio.encoder.work import Work, count_residues
from fedbio.encoder.workers import choose_devices, compute_with_workers
from fedbio.encoder_names import DEFAULT_ENCODER
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
        Proteins whose rows came from an earlier embeddings file, or from a run on others that was broken off.
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
    encoder: StrPath = DEFAULT_ENCODER,
    seed: int = 0,
    expected_sha256: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    long: Literal["cut", "window"] = "window",
    pooling: Pooling = "mean",
    layer: int | None = None,
    batch_residues: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
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
        The embeddings file to make. If it is there and holds these proteins, nothing is done; if it holds most of
        what it held before, it is brought up to date.
    encoder : str or path-like
        What `fedbio.encoder.load_encoder_weights` takes: a checkpoint, or the name of an encoder.
    seed : int
        Of the random weights of a built-in architecture.
    expected_sha256 : str, optional
        Digest that the weights must have.
    dtype : str
        See `fedbio.encoder.inference.choose_dtype`.
    device : str
        See `fedbio.encoder.workers.choose_devices`; of several, each gets a process of its own.
    long : {"window", "cut"}
        What to do with proteins longer than the encoder takes: pool over overlapping windows, or use their beginning.
    pooling : {"mean", "ends", "max", "start", "residues"}
        The average over residues, the same beside those of `fedbio.encoder.bins`, their maximum, the start token (its
        average over windows), or a row per residue.
    layer : int, optional
        The layer whose output is taken, 0 for the input of the first; by default the last.
    batch_residues : int, optional
        The most tokens in a pack, by default `fedbio.encoder.setup.BATCH_RESIDUES`, or less as `memory` needs it. Part
        of the plan: another number may change the last bits of the result.
    threads : int, optional
        CPU threads; by default as many as this process may use.
    memory : int, optional
        The most bytes of memory that this process shall take.
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
        If another process works on `output`, the disk is full or too small, `memory` is too little, or the device is
        missing.
    """
    started = time.perf_counter()
    target = Path(output)
    setup = Setup(
        EncoderChoice(
            encoder, seed, expected_sha256, dtype, device, long, pooling, layer, batch_residues, threads, memory
        )
    )
    with (
        exclusive_lock(target.with_name(f".{target.name}.lock"), str(target), wait=wait),
        Source(
            source, target.parent, label=f"{label}: reading", labels=labels, classes=classes, skip_invalid=skip_invalid
        ) as proteins,
    ):
        check_memory(len(proteins), setup.needed_bytes, memory)
        longer = proteins.longer_than(setup.info.max_residues)
        if longer:
            what = "cut to" if long == "cut" else "covered by windows of"
            log.warning(
                "long proteins %s %d residues proteins=%d of=%d", what, setup.info.max_residues, longer, len(proteins)
            )
        clear_leftovers(target)
        if target.exists() and _is_finished(target, proteins, setup.info):
            log.info("nothing to do, these proteins are embedded file=%s", target)
            reused, resumed = len(proteins), 0
        else:
            reused, resumed = _embed(target, setup, proteins, Path(reuse) if reuse else None, label)
    return EmbedReport(
        proteins=len(proteins),
        residues=proteins.residues,
        cut=longer if long == "cut" else 0,
        windowed=longer if long == "window" else 0,
        reused=reused,
        resumed=resumed,
        seconds=time.perf_counter() - started,
        encoder=setup.info,
    )


def _is_finished(target: Path, proteins: Source, info: EncoderInfo) -> bool:
    with Embeddings.open(target) as there:
        check_same_encoder(there.info, info, where=str(target), remedy="give another output, or delete this one")
        if not proteins.is_in(there):
            return False
        forget_within(target, there)  # a run that was killed after its last step left it
    return True


def _embed(target: Path, setup: Setup, proteins: Source, reuse: Path | None, label: str) -> tuple[int, int]:
    """Make the embeddings file; returns how many proteins were reused and how many sequences resumed."""
    if target.exists() and reuse is not None and not target.samefile(reuse):
        raise DataError(
            f"{target}: holds the embeddings of other proteins; give another output, or leave --reuse "
            "out to bring this one up to date"
        )
    while (planned := _plan(target, setup, proteins, reuse)) is None:
        pass  # unfinished work on other proteins is in its file now
    known, work, name = planned
    with known:
        parts = Parts(target, info=setup.info, work=name, rows=work.rows)
        rows = count_residues(proteins.lengths, setup.info) if setup.info.pooling == RESIDUES else None
        check_room(target, setup.info, proteins=len(proteins), rows=rows, waiting=work.rows - parts.done)
        record(parts.folder, work, _fresh_digests(proteins, known))
        assembly = Assembly(proteins.numbers, known, work, parts)
        resumed = assembly.begun()
        if parts.done < work.rows:
            with Progress(label, total=work.residues, unit="residues") as progress:
                devices = choose_devices(setup.choice.device, work.residues)
                if len(devices) > 1:
                    compute_with_workers(setup, devices, work, name, parts, target, progress.advance)
                else:
                    compute(setup.inference(), work, parts, progress.advance)
        write_stream(
            target,
            info=setup.info,
            proteins=len(proteins),
            heads=proteins.heads(),
            blocks=assembly.blocks(),
            pointers=None if rows is None else np.concatenate([[0], np.cumsum(rows)]),
        )
        forget(target)
        return int((known.places[proteins.numbers] >= 0).sum()), resumed


def _plan(target: Path, setup: Setup, proteins: Source, reuse: Path | None) -> tuple[KnownRows, Work, str] | None:
    """Find out which rows are there, and what is to be computed; None if more rows are there afterwards."""
    check_kept(target, setup.info)
    earlier, kept = target if target.exists() else reuse, kept_file(target)
    paths = ([earlier] if earlier else []) + ([kept] if kept.exists() else [])
    with contextlib.ExitStack() as stack:
        known = stack.enter_context(
            KnownRows(paths, setup.info, sequences=len(proteins.distinct), digests=proteins.distinct_digests())
        )
        if target.exists():
            _check_update(target, proteins, known, asked=reuse is not None)
        work = Work(proteins.distinct.those(known.places < 0), setup.info, budget=setup.budget)
        name = work.name(_fresh_digests(proteins, known))
        if keep_rows(target, setup.info, name):
            return None
        stack.pop_all()
        return known, work, name


def _check_update(target: Path, proteins: Source, known: KnownRows, *, asked: bool) -> None:
    """Bring an output up to date if most of it stays; what looks like another file is not replaced unasked."""
    if not asked and 2 * known.found < known.stored:
        raise DataError(
            f"{target}: holds the embeddings of other proteins: of its {known.stored:,} sequences {known.found:,} are "
            f"here; give another output, or bring it up to date nevertheless with `--reuse {target}`"
        )
    log.info(
        "output brought up to date file=%s kept=%d new=%d left_out=%d",
        target, known.found, len(proteins.distinct) - known.found, known.stored - known.found,
    )  # fmt: skip


def _fresh_digests(proteins: Source, known: KnownRows) -> Iterator[NDArray[np.uint8]]:
    first = 0
    for digests in proteins.distinct_digests():
        yield digests[known.places[first : first + len(digests)] < 0]
        first += len(digests)
