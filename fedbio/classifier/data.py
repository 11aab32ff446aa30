"""Join a party's proteins with their embeddings and split them: what it trains on, chooses by and is tested on."""

from __future__ import annotations

__all__ = ["SiteData", "load_features", "load_site_data", "merge_sites"]

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedbio.classifier.examples import TrainData
from fedbio.classifier.residues import Features, Residues, join
from fedbio.embeddings import RESIDUES, Embeddings, sequence_digest
from fedbio.errors import DataError
from fedbio.proteins import Protein, read
from fedbio.results import ClassCounts, DataRecord, EncoderInfo

_Path = str | os.PathLike[str]

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SiteData:
    """The labelled embeddings of one party, by split.

    Parameters
    ----------
    train, validation, test : TrainData
        With ids; any of them may be empty.
    classes : tuple of str
        In the order of the targets.
    encoder : EncoderInfo
        What made the embeddings.
    source : str
        The file's name without its folder.
    lengths : dict of str to int
        Residues of each protein, by id.
    digests : dict of str to bytes
        SHA-256 of each sequence, by id.
    """

    train: TrainData
    validation: TrainData
    test: TrainData
    classes: tuple[str, ...]
    encoder: EncoderInfo
    source: str
    lengths: Mapping[str, int] = field(repr=False)
    digests: Mapping[str, bytes] = field(repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self, name: str) -> TrainData:
        """Return ``"train"``, ``"validation"`` or ``"test"``."""
        return {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}[name]

    @property
    def counts(self) -> ClassCounts:
        """Number of proteins of each class in each split."""
        return ClassCounts(*(self._count(self.split(name)) for name in SPLITS))

    def describe(self, *, synthetic: bool = False) -> DataRecord:
        """Describe the data in counts, for the party's record."""
        return DataRecord(
            source=self.source,
            synthetic=synthetic,
            proteins=len(self),
            residues=sum(self.lengths.values()),
            longer=sum(length > self.encoder.max_residues for length in self.lengths.values()),
            counts=self.counts,
        )

    def _count(self, data: TrainData) -> dict[str, int]:
        numbers = np.bincount(data.targets, minlength=len(self.classes)).tolist()
        return {name: number for name, number in zip(self.classes, numbers, strict=True) if number}


def load_site_data(
    source: _Path,
    embeddings: _Path,
    classes: Sequence[str],
    *,
    validation_fraction: float = 0.1,
    labels: _Path | None = None,
    skip_invalid: bool = False,
    attention_residues: int = 1_000,
) -> SiteData:
    """Read a party's proteins and their embeddings.

    Parameters
    ----------
    source : path-like
        Anything that `fedbio.proteins.read` reads; every protein needs a label.
    embeddings : path-like
        The embeddings file of these proteins. One with a row per residue stays open as long as the data are used.
    classes : sequence of str
        The locations that the federation tells apart, in order.
    validation_fraction : float
        Share of the training proteins held back for validation, if the file flags none itself.
    labels, skip_invalid
        Passed to `fedbio.proteins.read`.
    attention_residues : int
        The most residues of a protein that are read, if there is a row for each.

    Returns
    -------
    SiteData

    Raises
    ------
    DataError
        If a label is missing or not among `classes`, or a protein has no embedding or that of another sequence.
    """
    proteins = list(read(source, labels=labels, classes=classes, require_labels=True, skip_invalid=skip_invalid))
    digests = {protein.id: sequence_digest(protein.sequence) for protein in proteins}
    held_back = _choose_validation(proteins, digests, validation_fraction)
    parts: dict[str, list[Protein]] = {name: [] for name in SPLITS}
    for protein in proteins:
        parts[TEST if protein.set == TEST else VALIDATION if protein.id in held_back else TRAIN].append(protein)
    place = {name: number for number, name in enumerate(classes)}
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Embeddings.open(embeddings))
        check_sequences(store, digests)
        loaded = {
            name: TrainData(
                load_features(store, [protein.id for protein in part], attention_residues),
                np.array([place[protein.target or ""] for protein in part], dtype=np.int64),
                tuple(protein.id for protein in part),
            )
            for name, part in parts.items()
        }
        encoder = store.info
        if encoder.pooling == RESIDUES:
            stack.pop_all()
    return SiteData(
        **loaded,
        classes=tuple(classes),
        encoder=encoder,
        source=Path(source).name,
        lengths={protein.id: len(protein.sequence) for protein in proteins},
        digests=digests,
    )


def load_features(store: Embeddings, ids: Sequence[str], attention_residues: int | None) -> Features:
    """Return the rows of proteins, or, where there is one per residue, what reads them: see `Residues`.

    Raises
    ------
    DataError
        If the file lacks one.
    """
    if store.info.pooling == RESIDUES:
        return Residues.of(store, ids, most=attention_residues)
    return store.rows(ids)


def check_sequences(store: Embeddings, digests: Mapping[str, bytes]) -> None:
    """Refuse an embeddings file in which one of these ids, with the SHA-256 of its sequence, is another protein."""
    for name, digest in zip(store.ids, store.digests, strict=True):
        if digests.get(name, digest.tobytes()) != digest.tobytes():
            raise DataError(
                f"{store.path}: record {name!r}: the embedding is that of another sequence; embed the proteins again"
            )


def _choose_validation(proteins: Sequence[Protein], digests: Mapping[str, bytes], fraction: float) -> set[str]:
    """Return the ids held back: those that the file flags, or else a share of the training proteins.

    The share is counted off by class and digest, so that every class gives its part, the order of the file does not
    matter, and proteins of equal sequence stay together.
    """
    flagged = {protein.id for protein in proteins if protein.validation}
    if flagged or not fraction:
        return flagged
    keys = {each.id: (each.target or "", digests[each.id]) for each in proteins if each.set == TRAIN}
    ordered = sorted(set(keys.values()))
    wanted = min(max(round(len(ordered) * fraction), 1), len(ordered) // 2)
    chosen = {ordered[(2 * number + 1) * len(ordered) // (2 * wanted)] for number in range(wanted)}
    return {name for name, key in keys.items() if key in chosen}


def merge_sites(parts: Sequence[SiteData]) -> SiteData:
    """Put the data of several parties together; a protein that several of them hold counts once, as the first has it.

    Raises
    ------
    DataError
        If the embeddings come from different encoders, an id stands for different proteins, or a protein is for
        training at one party and for testing at another.
    """
    first = parts[0]
    seen: dict[str, tuple[bytes, int, bool, str]] = {}
    kept: dict[str, list[TrainData]] = {name: [] for name in SPLITS}
    for part in parts:
        if part.encoder.differing(first.encoder):
            raise DataError(
                f"{part.source}: embedded with {_shown(part.encoder)}, but {first.source} with "
                f"{_shown(first.encoder)}; embed all files with one encoder"
            )
        for split in SPLITS:
            data, fresh = part.split(split), []
            for place, (name, target) in enumerate(zip(data.ids, data.targets.tolist(), strict=True)):
                now = (part.digests[name], target, split == TEST, part.source)
                before = seen.setdefault(name, now)
                if before is now:
                    fresh.append(place)
                elif before[:2] != now[:2]:
                    raise DataError(
                        f"{part.source}: record {name!r} has another sequence or label than in {before[3]}; "
                        "give each protein its own id"
                    )
                elif before[2] != now[2]:
                    raise DataError(
                        f"{part.source}: record {name!r} is for {split} here, but not in {before[3]}; "
                        "give it the same SET in both files, or leave it out of one"
                    )
            ids = tuple(data.ids[place] for place in fresh)
            kept[split].append(TrainData(data.features[fresh], data.targets[fresh], ids))
    merged = {
        split: TrainData(
            join([data.features for data in pieces]),
            np.concatenate([data.targets for data in pieces]),
            tuple(name for data in pieces for name in data.ids),
        )
        for split, pieces in kept.items()
    }
    return SiteData(
        **merged,
        classes=first.classes,
        encoder=first.encoder,
        source=", ".join(part.source for part in parts),
        lengths={name: length for part in parts for name, length in part.lengths.items()},
        digests={name: digest for part in parts for name, digest in part.digests.items()},
    )


def _shown(encoder: EncoderInfo) -> str:
    pooling = f"{encoder.pooling} {encoder.bins}".rstrip()
    return (
        f"{encoder.name} (SHA-256 {encoder.weights_sha256}, {encoder.dtype}, pooling: {pooling}, "
        f"longer proteins: {encoder.long})"
    )
