"""What the tasks of a study of protein classifiers say: the words that server and executors share."""

from __future__ import annotations

__all__ = [
    "MEAN",
    "SCALE",
    "Alone",
    "Description",
    "EmbedSpec",
    "Embedded",
    "Evaluation",
    "Points",
    "Publication",
    "RunSpec",
    "Sample",
    "Study",
    "WeightsFile",
    "confusion_of",
    "meta",
    "model_manifest",
    "read_meta",
    "scores",
    "study_folder",
]

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.compartments import COMPARTMENTS
from fedbio.errors import ProtocolError
from fedbio.results import ClassCounts, EncoderInfo, MapPoint, Metric
from fedbio.settings import parse_network
from fedbio.tensors.check import Manifest

MEAN, SCALE = "standardizer.mean", "standardizer.scale"
"""Names of the standardizer's tensors, which travel beside a model's."""


class WeightsFile(msgspec.Struct, frozen=True):
    """A file of an encoder that the server can stream to a site that lacks it."""

    name: str
    sha256: str
    size: int


class EmbedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which encoder to embed with; without `files` it is built in and its weights come from `seed`."""

    name: str
    seed: int
    sha256: str | None
    dtype: Literal["auto", "float32", "bfloat16", "int8"]
    long: Literal["cut", "window"]
    pooling: Literal["mean", "ends", "max", "start", "residues"] = "mean"
    layer: int | None = None
    classes: tuple[str, ...] = COMPARTMENTS
    files: tuple[WeightsFile, ...] = ()

    @property
    def group(self) -> str:
        """One digest for all files: sites keep them together under it."""
        return hashlib.sha256("".join(each.sha256 for each in self.files).encode()).hexdigest()


class Embedded(msgspec.Struct, frozen=True):
    """What an embedding task returns: counts, seconds and the encoder, whose digest all sites must share."""

    proteins: int
    residues: int
    longer: int
    reused: int
    seconds: float
    encoder: EncoderInfo


Place = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$")]


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """How every site reads its data.

    `place` is the name under which each party keeps the results, empty for its own folder: see `study_folder`. Of
    embeddings of residues, `attention_residues` of a protein are read at most.
    """

    place: Place = ""
    classes: tuple[str, ...] = COMPARTMENTS
    validation_fraction: float = 0.1
    min_proteins: int = 10
    attention_residues: Annotated[int, msgspec.Meta(ge=2, le=100_000)] = 1_000


class Description(msgspec.Struct, frozen=True):
    """A site's data in counts."""

    counts: ClassCounts
    encoder: EncoderInfo

    def total(self, split: Literal["train", "validation", "test"]) -> int:
        """Return the number of proteins of a split."""
        return sum(getattr(self.counts, split).values())


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One classifier to train, from one seed; `hidden` is its name."""

    study: Study
    hidden: str
    seed: int
    rounds: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    dropout: float
    patience: int

    @property
    def name(self) -> str:
        """The run's name within its job."""
        return f"{self.hidden}-seed-{self.seed}"


class Evaluation(msgspec.Struct, frozen=True):
    """What a model said of a site's test proteins: counts by true and predicted class, and the mean loss.

    `confidence` counts validation proteins by the model's top probability, all and correct ones.
    """

    confusion: list[list[int]]
    loss: float
    confidence: list[list[int]] = []


class Alone(msgspec.Struct, frozen=True):
    """What a site that trained alone returns.

    `curve` holds, for each round, its number, the training loss, and accuracy and loss on validation proteins.
    """

    best_round: int
    curve: list[tuple[int, float | None, float | None, float | None]]
    test: Evaluation


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What every site learns at the end, beside the best model itself.

    `metrics` are those of all sites together; each site has its own ones itself.
    """

    study: Study
    encoder: EncoderInfo
    best: str
    seed: int
    best_round: int
    scores: dict[str, float]
    confidence: list[list[int]]
    rounds: dict[str, dict[str, int]]
    federation: dict[str, ClassCounts]
    settings: dict[str, Any]
    metrics: list[Metric]


class Sample(msgspec.Struct, frozen=True):
    """How many of a site's proteins to place on the map."""

    study: Study
    points: int


class Points(msgspec.Struct, frozen=True):
    """Points of the 2-D map."""

    points: list[MapPoint]


S = TypeVar("S", bound=msgspec.Struct)


def study_folder(workspace: Path, place: Place) -> Path:
    """Return where a party keeps the results of a study: the first one's in its workspace, others' below it."""
    return workspace / "studies" / place if place else workspace


def meta(content: msgspec.Struct) -> dict[str, Any]:
    """Return a struct in the form that `FLModel.meta` carries."""
    built: dict[str, Any] = msgspec.to_builtins(content)
    return built


def read_meta(content: Mapping[str, Any], kind: type[S]) -> S:
    """Return the struct that a `FLModel.meta` carries.

    Raises
    ------
    ProtocolError
        If it is not one of this kind.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"not a {kind.__name__}: {error}; do both ends run one release?") from error


def model_manifest(width: int, hidden: str, classes: int) -> Manifest:
    """Return names, shapes and dtypes of a classifier's parameters."""
    shapes = parse_network(hidden).tensors(width, classes)
    return {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}


def scores(confusion: NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy, macro F1 (over classes that occur) and Matthews correlation of a confusion matrix.

    Parameters
    ----------
    confusion : ndarray, shape (C, C), dtype=np.int64
        Rows are true classes, columns predicted ones.
    """
    counts = confusion.astype(np.float64)
    total, hits = counts.sum(), np.diagonal(counts)
    true, said = counts.sum(axis=1), counts.sum(axis=0)
    if total == 0:
        return {}
    occurring = (true + said) > 0
    f1 = 2 * hits[occurring] / (true + said)[occurring]
    # Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient"
    spread = np.sqrt((total**2 - said @ said) * (total**2 - true @ true))
    correlation = (hits.sum() * total - true @ said) / spread if spread else 0.0
    return {"accuracy": float(hits.sum() / total), "macro_f1": float(f1.mean()), "mcc": float(correlation)}


def confusion_of(evaluations: Sequence[Evaluation], classes: int) -> NDArray[np.int64]:
    """Return the sum of confusion matrices.

    Raises
    ------
    ProtocolError
        If one is not of shape (classes, classes), or holds a negative number.
    """
    total = np.zeros((classes, classes), np.int64)
    for each in evaluations:
        if [len(row) for row in each.confusion] != [classes] * classes or min(map(min, each.confusion)) < 0:
            raise ProtocolError(f"a confusion matrix is not {classes} rows of {classes} counts")
        total += np.array(each.confusion, np.int64)
    return total
