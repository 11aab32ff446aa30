"""Predict the locations of embedded proteins with a trained classifier and write them as a table."""

from __future__ import annotations

__all__ = ["PredictReport", "check_encoder", "predict_file"]

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbio.classifier.data import check_sequences, load_features
from fedbio.classifier.model_files import Model
from fedbio.embeddings import Embeddings, sequence_digest
from fedbio.errors import DataError
from fedbio.proteins import read
from fedbio.results import EncoderInfo, write_table

BLOCK_ROWS = 8_192
"""Proteins at a time, so that memory does not grow with the table."""


@dataclass(frozen=True)
class PredictReport:
    """What was predicted, in counts.

    Parameters
    ----------
    proteins, unsure : int
        Rows of the table, and how many of them are flagged.
    locations : dict of str to int
        Rows by predicted location, the most frequent first.
    """

    proteins: int
    unsure: int
    locations: dict[str, int]


def check_encoder(found: EncoderInfo, trained_with: EncoderInfo, *, where: str) -> None:
    """Refuse embeddings of an encoder other than the one that the classifier was trained with.

    Only the arithmetic may differ: embeddings in float32 and in bfloat16 agree to two or three digits.

    Raises
    ------
    DataError
        With both SHA-256, or the setting that differs.
    """
    if found.weights_sha256 != trained_with.weights_sha256:
        raise DataError(
            f"{where}: made with the encoder {found.name!r} of SHA-256 {found.weights_sha256}, but the classifier was "
            f"trained with {trained_with.name!r} of SHA-256 {trained_with.weights_sha256}; use that encoder"
        )
    for name in found.differing(trained_with):
        if name not in ("name", "dtype"):
            here, there = getattr(found, name), getattr(trained_with, name)
            raise DataError(
                f"{where}: made with {name} {here!r}, but the classifier was trained with {there!r}; "
                "embed the proteins in the same way"
            )


def predict_file(
    model: Model,
    source: str | os.PathLike[str],
    embeddings: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    skip_invalid: bool = False,
) -> PredictReport:
    """Predict every protein of a file.

    Parameters
    ----------
    model : Model
    source : path-like
        Anything that `fedbio.proteins.read` reads; labels are not used.
    embeddings : path-like
        The embeddings file that holds these proteins.
    output : path-like
        CSV with the columns ``id``, ``location``, ``probability``, ``unsure`` and one per class with its probability,
        in the order of `source`; appears whole.
    skip_invalid : bool
        Passed to `fedbio.proteins.read`.

    Returns
    -------
    PredictReport

    Raises
    ------
    DataError
        If the embeddings come from another encoder, lack a protein, or are those of another sequence.
    """
    digests = {each.id: sequence_digest(each.sequence) for each in read(source, skip_invalid=skip_invalid)}
    locations: Counter[str] = Counter()
    unsure = 0

    def rows(store: Embeddings, ids: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        nonlocal unsure
        for first in range(0, len(ids), BLOCK_ROWS):
            block = ids[first : first + BLOCK_ROWS]
            probabilities = model.predict(load_features(store, block, model.card.attention_residues))
            flags = model.is_unsure(probabilities).tolist()
            for name, row, best, flag in zip(
                block, probabilities.tolist(), probabilities.argmax(axis=1).tolist(), flags, strict=True
            ):
                location = model.card.classes[best]
                locations[location] += 1
                unsure += flag
                yield (name, location, f"{row[best]:.6f}", str(flag).lower(), *(f"{value:.6f}" for value in row))

    with Embeddings.open(embeddings) as store:
        check_encoder(store.info, model.card.encoder, where=str(Path(embeddings)))
        check_sequences(store, digests)
        columns = ("id", "location", "probability", "unsure", *model.card.classes)
        write_table(output, columns, rows(store, list(digests)))
    return PredictReport(len(digests), unsure, dict(locations.most_common()))
