"""Join a site's proteins with their embeddings and split them: what a site trains on, chooses by and is tested on."""

from __future__ import annotations

__all__ = ["SiteData", "load_site_data", "merge_sites"]

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedbio.classifier.examples import TrainData
from fedbio.embeddings import Embeddings, sequence_digest
from fedbio.errors import DataError
from fedbio.proteins import Protein, check_labels, read
from fedbio.results import ClassCounts, DataRecord, EncoderInfo

_Path = str | os.PathLike[str]

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)


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
    residues : int
        Number of residues of all proteins.
    longer : int
        Proteins longer than the encoder takes whole.
    """

    train: TrainData
    validation: TrainData
    test: TrainData
    classes: tuple[str, ...]
    encoder: EncoderInfo
    source: str
    residues: int
    longer: int

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)

    @property
    def counts(self) -> ClassCounts:
        """Number of proteins of each class in each split."""
        return ClassCounts(*(self._count(getattr(self, split)) for split in SPLITS))

    def describe(self, *, synthetic: bool = False) -> DataRecord:
        """Describe the data in counts, for the party's record."""
        return DataRecord(self.source, synthetic, len(self), self.residues, self.longer, self.counts)

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
) -> SiteData:
    """Read a party's proteins and their embeddings.

    Parameters
    ----------
    source : path-like
        Anything that `fedbio.proteins.read` reads; every protein needs a label.
    embeddings : path-like
        The embeddings file of these proteins.
    classes : sequence of str
        The locations that the federation tells apart, in order.
    validation_fraction : float
        Share of the training proteins held back for validation, if the file flags none itself.
    labels, skip_invalid
        Passed to `fedbio.proteins.read`.

    Returns
    -------
    SiteData

    Raises
    ------
    DataError
        If a label is missing or not among `classes`, or a protein has no embedding or that of another sequence.
    """
    proteins = list(read(source, labels=labels, require_labels=True, skip_invalid=skip_invalid))
    check_labels(proteins, classes, source=str(source))
    digests = {protein.id: sequence_digest(protein.sequence) for protein in proteins}
    held_back = _choose_validation(proteins, digests, validation_fraction)
    parts: dict[str, list[Protein]] = {split: [] for split in SPLITS}
    for protein in proteins:
        parts[TEST if protein.set == TEST else VALIDATION if protein.id in held_back else TRAIN].append(protein)
    number = {name: place for place, name in enumerate(classes)}
    with Embeddings.open(embeddings) as store:
        _check_digests(store, digests)
        loaded = {
            split: TrainData(
                store.rows([protein.id for protein in part]),
                np.array([number[str(protein.target)] for protein in part], dtype=np.int64),
                tuple(protein.id for protein in part),
            )
            for split, part in parts.items()
        }
        encoder = store.info
    return SiteData(
        **loaded,
        classes=tuple(classes),
        encoder=encoder,
        source=Path(source).name,
        residues=sum(len(protein.sequence) for protein in proteins),
        longer=sum(len(protein.sequence) > encoder.max_residues for protein in proteins),
    )


def _choose_validation(proteins: Sequence[Protein], digests: Mapping[str, bytes], fraction: float) -> set[str]:
    """Return the ids held back: those that the file flags, or else every so-manieth of the training proteins.

    They are counted off by class and digest, so that every class gives its share, the order of the file does not
    matter, and proteins of equal sequence stay together.
    """
    flagged = {protein.id for protein in proteins if protein.validation}
    training = {(str(each.target), digests[each.id]) for each in proteins if each.set == TRAIN}
    if flagged or not fraction:
        return flagged
    wanted = min(max(round(len(training) * fraction), 1), len(training) - 1)
    places = (np.arange(wanted) + 0.5) * len(training) / max(wanted, 1)
    ordered = sorted(training)
    chosen = {ordered[int(place)] for place in places}
    return {each.id for each in proteins if each.set == TRAIN and (str(each.target), digests[each.id]) in chosen}


def _check_digests(store: Embeddings, digests: Mapping[str, bytes]) -> None:
    for name, digest in zip(store.ids, store.digests, strict=True):
        if name in digests and digests[name] != digest.tobytes():
            raise DataError(
                f"{store.path}: record {name!r}: the embedding is that of another sequence; embed the proteins again"
            )


def merge_sites(parts: Sequence[SiteData]) -> SiteData:
    """Put the data of several parties together; a protein that several of them hold counts once.

    Raises
    ------
    DataError
        If the embeddings come from different encoders, or an id stands for different proteins or is in different splits.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.encoder != first.encoder:
            raise DataError(
                f"{part.source}: embedded with {_shown(part.encoder)}, but {first.source} with "
                f"{_shown(first.encoder)}; embed all files with one encoder"
            )
    seen: dict[str, tuple[str, bytes, int, str]] = {}
    merged: dict[str, TrainData] = {}
    for split in SPLITS:
        features, targets, ids = [], [], []
        for part in parts:
            data: TrainData = getattr(part, split)
            for place, name in enumerate(data.ids):
                vector, target = data.features[place], int(data.targets[place])
                now = (split, vector.tobytes(), target, part.source)
                before = seen.setdefault(name, now)
                if before is now:
                    features.append(vector)
                    targets.append(target)
                    ids.append(name)
                elif before[0] != split:
                    raise DataError(
                        f"{part.source}: record {name!r} is for {split} here and for {before[0]} in {before[3]}; "
                        "leave it out of one of the files"
                    )
                elif before[1:3] != now[1:3]:
                    raise DataError(
                        f"{part.source}: record {name!r} is another protein or has another label than in {before[3]}; "
                        "give each protein its own id"
                    )
        width = first.encoder.width
        stacked = np.stack(features) if features else np.empty((0, width), dtype=np.float32)
        merged[split] = TrainData(stacked, np.array(targets, dtype=np.int64), tuple(ids))
    return SiteData(
        **merged,
        classes=first.classes,
        encoder=first.encoder,
        source=", ".join(part.source for part in parts),
        residues=0,
        longer=0,
    )


def _shown(encoder: EncoderInfo) -> str:
    return f"{encoder.name} ({encoder.weights_sha256[:12]}, {encoder.dtype}, long={encoder.long})"
