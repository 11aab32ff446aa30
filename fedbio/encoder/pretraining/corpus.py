"""Pack proteins once into two flat files, which are mapped into memory from then on: a start takes no time."""

from __future__ import annotations

__all__ = ["FACTS_FILE", "Corpus", "CorpusFacts", "Proteins", "Source", "corpus_of"]

import hashlib
import itertools
import logging
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.encoder.pretraining.exclusion import read_exclusion
from fedbio.encoder.pretraining.recipe import changed_keys
from fedbio.errors import DataError, FormatError, SettingsError
from fedbio.files import sha256_file, sync_folder
from fedbio.progress import Progress
from fedbio.proteins import ReadCounts, read

log = logging.getLogger(__name__)

FACTS_FILE = "corpus.json"
PARTS: tuple[Literal["train", "valid"], ...] = ("train", "valid")


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that proteins came from, as it was then."""

    name: str
    bytes: int
    changed_ns: int
    sha256: str


class CorpusFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a packed corpus was made of.

    Parameters
    ----------
    sources, valid_sources, excluded_sources : tuple of Source
        Files of proteins to train on, of held-out proteins, and of what must not be used.
    valid_fraction : float
        Share that a hash of seed and sequence holds out, where no file of held-out proteins is given.
    seed : int
    proteins, residues : dict of str to int
        In ``train`` and ``valid``.
    excluded : int
        Records left out because `excluded_sources` name their sequence or id.
    excluded_parts : int
        Records left out because they are a part of an excluded sequence, or have one as a part.
    held_out_twins : int
        Records left out of training because a held-out protein has the same sequence.
    invalid : int
        Records left out because they are no proteins.
    sha256 : dict of str to str
        Of the sequences in ``train`` and ``valid``, in order and one a line, so that anyone who has the files can prove
        what was trained on and what was not.
    """

    format: Literal["fedbio-corpus"] = "fedbio-corpus"
    version: Literal[1] = 1
    sources: tuple[Source, ...]
    valid_sources: tuple[Source, ...]
    excluded_sources: tuple[Source, ...]
    valid_fraction: float
    seed: int
    proteins: dict[str, int]
    residues: dict[str, int]
    excluded: int
    excluded_parts: int = 0  # a release before learnt from them
    held_out_twins: int
    invalid: int
    sha256: dict[str, str] = {}  # a release before did not write it


@dataclass(frozen=True)
class Proteins:
    """Many sequences end to end.

    Parameters
    ----------
    residues : ndarray, shape (residues,), uint8
        Letters in ASCII, mapped from disk.
    ends : ndarray, shape (proteins + 1,), int64
        Protein k is ``residues[ends[k]:ends[k + 1]]``.
    """

    residues: NDArray[np.uint8]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends) - 1


@dataclass(frozen=True)
class Corpus:
    """Proteins to train on, proteins to measure with, and what is known of both."""

    train: Proteins
    valid: Proteins
    facts: CorpusFacts


@dataclass(frozen=True)
class Inputs:
    """What a corpus is to be made of; the fields are those of `corpus_of`."""

    sources: Sequence[Path]
    valid: Sequence[Path] = ()
    valid_fraction: float = 0.01
    exclude: Sequence[Path] = ()
    exclude_ids: Sequence[Path] = ()
    seed: int = 0
    skip_invalid: bool = False


def corpus_of(folder: Path, inputs: Inputs, *, build: bool = True) -> Corpus:
    """Open the packed corpus in a folder; where there is none, make it first.

    Parameters
    ----------
    folder : Path
        Appears whole.
    inputs : Inputs
    build : bool
        False for the processes that wait for the one that makes it.

    Raises
    ------
    SettingsError
        If the folder was packed from other files; the message names them.
    DataError
        If a file is wrong, or no protein is left to train on.
    """
    facts_file = folder / FACTS_FILE
    if facts_file.is_file():
        facts = _read_facts(facts_file)
        _check_same(facts, inputs, folder)
    else:
        assert build, f"{folder} should be there by now"
        facts = _build(folder, inputs)
    train, valid = _map(folder, "train", facts), _map(folder, "valid", facts)
    if not facts.sha256:
        facts = msgspec.structs.replace(facts, sha256={"train": _list_digest(train), "valid": _list_digest(valid)})
    return Corpus(train, valid, facts)


def _read_facts(path: Path) -> CorpusFacts:
    try:
        return msgspec.json.decode(path.read_bytes(), type=CorpusFacts)
    except msgspec.DecodeError as error:
        raise FormatError(f"{path}: not a corpus that this release can read: {error}; delete its folder") from error


def _check_same(facts: CorpusFacts, inputs: Inputs, folder: Path) -> None:
    """Refuse to go on with another corpus than the run began with."""
    before = {"seed": facts.seed, "valid_fraction": facts.valid_fraction}
    now = {"seed": inputs.seed, "valid_fraction": 0.0 if inputs.valid else inputs.valid_fraction}
    changes = changed_keys(before, now)
    for key, known, paths in (
        ("sources", facts.sources, inputs.sources),
        ("valid", facts.valid_sources, inputs.valid),
        ("exclude", facts.excluded_sources, _excluding(inputs)),
    ):
        changes += _changed_files(key, known, [_source(path, known=known) for path in paths])
    if changes:
        raise SettingsError(
            f"{folder.parent}: this run began with other proteins: {'; '.join(changes)}; give the same files and "
            "options to go on with it, or another folder with -o to begin anew"
        )


def _changed_files(key: str, before: Sequence[Source], now: Sequence[Source]) -> list[str]:
    """Say by their names which files were given and are given, if their contents differ."""
    if [each.sha256 for each in before] == [each.sha256 for each in now]:
        return []
    names = [", ".join(each.name for each in files) or "none" for files in (before, now)]
    if names[0] != names[1]:
        return [f"{key} was {names[0]} and is {names[1]}"]
    changed = [new.name for old, new in zip(before, now, strict=True) if old.sha256 != new.sha256]
    return [f"{key} was {names[0]} and is of the same name, but the content of {', '.join(changed)} is another"]


def _excluding(inputs: Inputs) -> list[Path]:
    return [*inputs.exclude, *inputs.exclude_ids]


def _source(path: Path, *, known: Sequence[Source] = ()) -> Source:
    """Describe a file; one that looks as it did is not read again."""
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    for each in known:
        if (each.name, each.bytes, each.changed_ns) == (path.name, stat.st_size, stat.st_mtime_ns):
            return each
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    return Source(name=path.name, bytes=stat.st_size, changed_ns=stat.st_mtime_ns, sha256=sha256_file(path))


def _build(folder: Path, inputs: Inputs) -> CorpusFacts:
    sources = tuple(_source(path) for path in inputs.sources)
    valid_sources = tuple(_source(path) for path in inputs.valid)
    excluded_sources = tuple(_source(path) for path in _excluding(inputs))
    exclusion = read_exclusion(inputs.exclude, inputs.exclude_ids)
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    counts = ReadCounts()
    excluded = parts = twins = 0
    held_out: set[bytes] = set()
    with (
        _Writer(beside, "train") as train,
        _Writer(beside, "valid") as valid,
        Progress("reading proteins", total=None, unit="proteins", passing=True) as progress,
    ):
        records = itertools.chain(
            ((True, each) for each in _records(inputs.valid, inputs, counts)),
            ((False, each) for each in _records(inputs.sources, inputs, counts)),
        )
        for given_as_valid, (identifier, sequence) in records:
            progress.advance(1)
            digest = hashlib.sha256(sequence).digest()
            if exclusion.names(identifier, digest):
                excluded += 1
            elif exclusion.overlap.holds(sequence):
                parts += 1
            elif given_as_valid:
                held_out.add(digest)
                valid.add(sequence)
            elif digest in held_out:
                twins += 1
            elif not inputs.valid and _falls_out(sequence, inputs.seed, inputs.valid_fraction):
                valid.add(sequence)
            else:
                train.add(sequence)
    if not len(train.ends) - 1:
        raise DataError(
            f"{inputs.sources[0]}: no protein is left to train on; {excluded + parts} are excluded, {twins} held out"
        )
    facts = CorpusFacts(
        sources=sources,
        valid_sources=valid_sources,
        excluded_sources=excluded_sources,
        valid_fraction=0.0 if inputs.valid else inputs.valid_fraction,
        seed=inputs.seed,
        proteins={"train": len(train.ends) - 1, "valid": len(valid.ends) - 1},
        residues={"train": train.ends[-1], "valid": valid.ends[-1]},
        excluded=excluded,
        excluded_parts=parts,
        held_out_twins=twins,
        invalid=sum(counts.skipped.values()),
        sha256={"train": train.digest.hexdigest(), "valid": valid.digest.hexdigest()},
    )
    (beside / FACTS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    sync_folder(beside)
    os.replace(beside, folder)
    sync_folder(folder.parent)
    log.info(
        "corpus packed proteins=%d residues=%d held_out=%d excluded=%d excluded_parts=%d",
        facts.proteins["train"],
        facts.residues["train"],
        facts.proteins["valid"],
        excluded,
        parts,
    )
    return facts


def _records(paths: Sequence[Path], inputs: Inputs, counts: ReadCounts) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        for protein in read(path, classes=None, skip_invalid=inputs.skip_invalid, counts=counts):
            yield protein.id, protein.sequence.encode()


def _falls_out(sequence: bytes, seed: int, fraction: float) -> bool:
    """Whether a hash of seed and sequence holds a protein out: its twins go the same way, in any order of any files."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + sequence).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


class _Writer:
    """Append sequences to a flat file, and remember where they end."""

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        self.ends = array("q", [0])
        self.digest = hashlib.sha256()
        self._file: BinaryIO

    def __enter__(self) -> _Writer:
        self._file = open(self._folder / f"{self._part}.residues", "wb", buffering=1 << 20)
        return self

    def add(self, sequence: bytes) -> None:
        self._file.write(sequence)
        self.digest.update(sequence)
        self.digest.update(b"\n")
        self.ends.append(self.ends[-1] + len(sequence))

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                np.save(self._folder / f"{self._part}.ends.npy", np.frombuffer(self.ends, dtype=np.int64))


def _list_digest(proteins: Proteins) -> str:
    digest = hashlib.sha256()
    for start, end in itertools.pairwise(proteins.ends.tolist()):
        digest.update(proteins.residues[start:end].data)
        digest.update(b"\n")
    return digest.hexdigest()


def _map(folder: Path, part: Literal["train", "valid"], facts: CorpusFacts) -> Proteins:
    path = folder / f"{part}.residues"
    residues, proteins = facts.residues[part], facts.proteins[part]
    try:
        ends = np.load(folder / f"{part}.ends.npy", mmap_mode="r", allow_pickle=False)
        whole = path.stat().st_size == residues and ends.shape == (proteins + 1,) and ends.dtype == np.int64
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder}: the packed corpus is damaged ({error}); delete this folder") from error
    if not whole or int(ends[-1]) != residues:
        raise FormatError(f"{path}: not the {residues:,} residues that {FACTS_FILE} speaks of; delete this folder")
    # an empty file cannot be mapped
    letters = np.memmap(path, dtype=np.uint8, mode="r") if residues else np.empty(0, np.uint8)
    return Proteins(letters, ends)
