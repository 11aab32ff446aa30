"""Embed a file of proteins: read, plan, compute what is not there yet, and write the embeddings file whole."""

from __future__ import annotations

__all__ = ["EmbedReport", "embed_file"]

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from fedbio.embeddings import (
    CHUNK_ROWS,
    Embeddings,
    EmbeddingsWriter,
    check_same_encoder,
    sequence_digest,
    write_embeddings,
)
from fedbio.encoder.checkpoint import load_encoder_weights
from fedbio.encoder.inference import Inference, choose_device, choose_dtype
from fedbio.encoder.packs import Plan, make_plan
from fedbio.errors import DataError, RefusedError
from fedbio.files import exclusive_lock
from fedbio.progress import Progress
from fedbio.proteins import read
from fedbio.results import EncoderInfo
from fedbio.weights import EncoderConfig, Weights, weights_digest

log = logging.getLogger(__name__)

BATCH_RESIDUES = {"cpu": 2048, "cuda": 65_536}
"""Tokens of a pack by kind of device, where the caller names no number."""

_Path = str | os.PathLike[str]


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
        Distinct proteins that an interrupted run had finished.
    seconds : float
        From reading the source to the finished file.
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


class Source:
    """The proteins of a file as inference wants them: ids, lengths, digests, and each distinct sequence once."""

    def __init__(self, path: _Path, *, labels: _Path | None, skip_invalid: bool) -> None:
        self.ids: list[str] = []
        self.lengths: list[int] = []
        self.digests: list[bytes] = []
        self.sequences: dict[bytes, bytes] = {}
        for protein in read(path, labels=labels, skip_invalid=skip_invalid):
            digest = sequence_digest(protein.sequence)
            self.ids.append(protein.id)
            self.lengths.append(len(protein.sequence))
            self.digests.append(digest)
            self.sequences.setdefault(digest, protein.sequence.encode())

    def is_in(self, embeddings: Embeddings) -> bool:
        """Whether a file holds exactly these proteins in this order."""
        return embeddings.ids == self.ids and embeddings.digests.tobytes() == b"".join(self.digests)


def embed_file(
    source: _Path,
    output: _Path,
    *,
    encoder: _Path = "esm1nv-44m",
    seed: int = 0,
    expected_sha256: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    long: Literal["cut", "window"] = "cut",
    batch_residues: int | None = None,
    threads: int | None = None,
    reuse: _Path | None = None,
    label: str = "embedding",
    skip_invalid: bool = False,
    labels: _Path | None = None,
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
        The most tokens in a pack; 2,048 on a CPU and 65,536 on CUDA. Part of the plan: another number may change the
        last bits of the result.
    threads : int, optional
        CPU threads; by default as many as this process may use.
    reuse : path-like, optional
        An embeddings file of the same encoder whose rows are taken for the sequences that it holds.
    label : str
        What the progress line says.
    skip_invalid, labels
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
    place = choose_device(device)
    arithmetic = choose_dtype(dtype, place)
    config, weights = load_encoder_weights(encoder, seed=seed)
    info = encoder_info(config, weights, dtype=arithmetic, long=long)
    if expected_sha256 is not None and info.weights_sha256 != expected_sha256:
        raise RefusedError(
            f"encoder {str(encoder)!r}: its weights have SHA-256 {info.weights_sha256}, "
            f"but {expected_sha256} is expected; nothing was embedded"
        )
    if not info.trained:
        log.warning("untrained encoder name=%s sha256=%.12s", info.name, info.weights_sha256)
    proteins = Source(source, labels=labels, skip_invalid=skip_invalid)
    longer = sum(length > info.max_residues for length in proteins.lengths)
    if longer:
        what = "cut to" if long == "cut" else "averaged over windows of"
        log.warning("proteins %s %d residues proteins=%d of=%d", what, info.max_residues, longer, len(proteins.ids))

    def report(reused: int, resumed: int) -> EmbedReport:
        return EmbedReport(
            proteins=len(proteins.ids),
            residues=sum(proteins.lengths),
            cut=longer if long == "cut" else 0,
            windowed=longer if long == "window" else 0,
            reused=reused,
            resumed=resumed,
            seconds=time.perf_counter() - started,
            encoder=info,
        )

    with exclusive_lock(target.with_name(f".{target.name}.lock"), str(target)):
        if target.exists() and _is_finished(target, proteins, info, reuse):
            log.info("nothing to do, the file holds these proteins file=%s", target)
            return report(len(proteins.ids), 0)
        known = _Known(reuse, info)
        todo = [digest for digest in proteins.sequences if digest not in known.places]
        sequences = [proteins.sequences[digest] for digest in todo]
        budget = batch_residues or BATCH_RESIDUES[place.type]
        plan = make_plan(
            [len(residues) for residues in sequences],
            max_residues=info.max_residues,
            windows=long == "window",
            budget=budget,
        )
        writer = EmbeddingsWriter(target, info=info, work=_work(todo, budget), rows=len(plan.protein))
        resumed = writer.done
        if resumed < len(plan.protein):
            inference = Inference(config, weights, device=place, dtype=arithmetic, threads=threads)
            _compute(inference, sequences, plan, writer, label)
        rows = _Assembly(proteins, todo, plan, writer, known)
        write_embeddings(
            target,
            info=info,
            ids=proteins.ids,
            lengths=proteins.lengths,
            digests=proteins.digests,
            blocks=rows.blocks(),
        )
        known.close()
        writer.remove()
    fresh = set(todo)
    return report(sum(digest not in fresh for digest in proteins.digests), len(np.unique(plan.protein[:resumed])))


def encoder_info(
    config: EncoderConfig, weights: Weights, *, dtype: torch.dtype, long: Literal["cut", "window"]
) -> EncoderInfo:
    """Describe how proteins become vectors, for the embeddings file and everything made from it."""
    return EncoderInfo(
        name=config.name,
        weights_sha256=weights_digest(weights),
        trained=config.trained,
        width=config.width,
        pooling="mean",
        layer=config.layers,
        dtype=str(dtype).removeprefix("torch."),
        max_residues=config.max_residues,
        long=long,
    )


def _is_finished(target: Path, proteins: Source, info: EncoderInfo, reuse: _Path | None) -> bool:
    with Embeddings.open(target) as there:
        check_same_encoder(there.info, info, where=str(target), remedy="give another output, or delete this one")
        if proteins.is_in(there):
            return True
    if reuse is not None and target.samefile(reuse):
        return False
    raise DataError(
        f"{target}: holds the embeddings of other proteins; give another output, "
        f"or --reuse {target} to keep the rows that fit"
    )


def _work(todo: list[bytes], budget: int) -> str:
    """Name a piece of work by all that its vectors and their order depend on."""
    return hashlib.sha256(b"packs 1 %d " % budget + b"".join(todo)).hexdigest()


class _Known:
    """Rows of an earlier embeddings file by the digest of their sequence; empty without a file."""

    def __init__(self, path: _Path | None, info: EncoderInfo) -> None:
        self.places: dict[bytes, int] = {}
        self._file: Embeddings | None = None
        if path is not None:
            self._file = Embeddings.open(path)
            remedy = "give the encoder that made it, or do without --reuse"
            check_same_encoder(self._file.info, info, where=str(path), remedy=remedy)
            self.places = {digest.tobytes(): place for place, digest in enumerate(self._file.digests)}

    def take(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._file is not None
        return self._file.take(places)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _compute(
    inference: Inference, sequences: list[bytes], plan: Plan, writer: EmbeddingsWriter, label: str
) -> None:
    """Compute the packs that the writer does not hold yet; a shard may end within a pack only if a run was broken off."""
    residues = plan.end - plan.begin
    with Progress(label, total=plan.residues, unit="residues") as progress:
        progress.advance(int(residues[: writer.done].sum()))
        first = int(np.searchsorted(plan.packs, writer.done))
        for number in range(first, len(plan.packs) - 1):
            writer.append(inference.pack(sequences, plan, number))
            progress.advance(int(residues[plan.packs[number] : plan.packs[number + 1]].sum()))
        writer.flush()


class _Assembly:
    """Rows of the finished file in the source's order, from pieces and from reused rows."""

    def __init__(
        self, proteins: Source, todo: list[bytes], plan: Plan, writer: EmbeddingsWriter, known: _Known
    ) -> None:
        self._digests, self._known, self._writer = proteins.digests, known, writer
        self._width = 0
        self._numbers = {digest: number for number, digest in enumerate(todo)}
        # pieces of one protein side by side, in the order of their residues
        self._order = np.lexsort((plan.begin, plan.protein))
        self._firsts = np.searchsorted(plan.protein[self._order], np.arange(len(todo) + 1))
        counts = np.zeros(len(todo), dtype=np.int64)
        np.add.at(counts, plan.protein, plan.pool_end - plan.pool_begin)
        self._residues = counts

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        for first in range(0, len(self._digests), CHUNK_ROWS):
            yield self._block(self._digests[first : first + CHUNK_ROWS])

    def _block(self, digests: list[bytes]) -> NDArray[np.float32]:
        numbers = np.array([self._numbers.get(digest, -1) for digest in digests], dtype=np.int64)
        fresh = np.flatnonzero(numbers >= 0)
        old = np.flatnonzero(numbers < 0)
        parts = []
        if len(fresh):
            parts.append((fresh, self._means(numbers[fresh])))
        if len(old):
            places = np.array([self._known.places[digests[row]] for row in old], dtype=np.int64)
            parts.append((old, self._known.take(places)))
        block = np.empty((len(digests), parts[0][1].shape[1]), dtype=np.float32)
        for where, rows in parts:
            block[where] = rows
        return block

    def _means(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        firsts, counts = self._firsts[numbers], self._firsts[numbers + 1] - self._firsts[numbers]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        sums = self._writer.take(self._order[np.repeat(firsts, counts) + within])
        totals = np.add.reduceat(sums, starts, axis=0)
        means: NDArray[np.float32] = totals / self._residues[numbers].astype(np.float32)[:, None]
        return means
