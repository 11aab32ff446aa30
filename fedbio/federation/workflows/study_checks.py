"""Decide whether what a site says in a study can be true: an answer that cannot is its own loss, not the others'."""

from __future__ import annotations

__all__ = [
    "CONFIDENCE_SHAPE",
    "alone_answer",
    "description_answer",
    "embedded_answer",
    "evaluation_answer",
    "moments_answer",
    "of_most",
    "points_answer",
    "scatter_answer",
    "weights_answer",
]

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from fedbio.errors import ProtocolError
from fedbio.federation.model import Result
from fedbio.federation.workflows.counting import MAX_COUNT, SPLITS
from fedbio.federation.workflows.study import Alone, Description, Embedded, Evaluation, Points, RunSpec, read_meta

CONFIDENCE_SHAPE = (2, 50)
"""Rows and bins of `Evaluation.confidence`, as `fedbio.classifier.confidence_counts` makes them."""

MAX_WIDTH = 1 << 20
"""Of embeddings: more than any encoder's, and a model for it can still be described."""

LARGEST = float(np.finfo(np.float32).max)
"""Means and components become float32."""

Check = Callable[[Result], None]
"""Raises `ProtocolError` if a result may not count: `fedbio.federation.acceptance.Expectation.check`."""


def description_answer(classes: Collection[str]) -> Check:
    """Return the check of a `Description`: counts of known classes, and embeddings of a possible width."""

    def check(result: Result) -> None:
        said = read_meta(result.model.meta, Description)
        for split in SPLITS:
            counts: dict[str, int] = getattr(said.counts, split)
            if unknown := sorted(counts.keys() - set(classes)):
                raise ProtocolError(f"it counts proteins of {unknown[0]!r}, which is no class of this study")
            _check_counts(counts.values())
        if not (said.encoder.whole_width >= 1 and said.encoder.width <= MAX_WIDTH):
            raise ProtocolError(f"embeddings of width {said.encoder.width}; expected 1 to {MAX_WIDTH:,}")

    return check


def moments_answer(most_rows: int) -> Check:
    """Return the check of sums of features: of at most `most_rows` rows a protein, none larger than float32 allows."""

    def check(result: Result) -> None:
        proteins, params = result.model.weight, result.model.params
        if not params:
            return  # it abstains
        rows = float(params["count"][0]) if "count" in params else proteins
        if not proteins <= rows <= proteins * most_rows:
            raise ProtocolError(
                f"{rows:,.0f} residues of {proteins:,.0f} proteins with at most {most_rows:,} each; do all parties run "
                "one release?"
            )
        if params["squares"].min() < 0:
            raise ProtocolError("a sum of squares is negative")
        if max(params["squares"].max(), np.abs(params["sum"]).max()) > rows * LARGEST:
            raise ProtocolError("a sum of features is beyond what float32 features can have")

    return check


def scatter_answer(result: Result) -> None:
    """Check that sums of products are such that those of all sites can be added and decomposed."""
    products = result.model.params.get("products")
    if products is not None and np.abs(products).max() > result.model.weight * LARGEST:
        raise ProtocolError("a sum of products is beyond what float32 features can have")


def evaluation_answer(classes: int) -> Check:
    """Return the check of an `Evaluation` of a model with so many classes."""

    def check(result: Result) -> None:
        _check_evaluation(read_meta(result.model.meta, Evaluation), classes)

    return check


def alone_answer(spec: RunSpec) -> Check:
    """Return the check of what a site that trained alone says: rounds of the run, and finite numbers."""

    def check(result: Result) -> None:
        said = read_meta(result.model.meta, Alone)
        rounds = [number for number, *_ in said.curve]
        possible = all(0 <= number <= spec.rounds for number in (*rounds, said.best_round))
        if not possible or len(set(rounds)) < len(rounds):
            raise ProtocolError(f"its curve is not one of {spec.rounds} rounds")
        _check_finite(value for _, *values in said.curve for value in values)
        _check_evaluation(said.test, len(spec.study.classes))

    return check


def points_answer(classes: Collection[str]) -> Check:
    """Return the check of points on a map: finite, of known classes and splits."""

    def check(result: Result) -> None:
        for point in read_meta(result.model.meta, Points).points:
            _check_finite((point.x, point.y))
            if point.target not in classes or point.split not in SPLITS:
                raise ProtocolError(f"a point of class {point.target!r} and split {point.split!r}, which do not exist")

    return check


def embedded_answer(result: Result) -> None:
    """Check that a result says what was embedded; raise `ProtocolError` if it does not."""
    read_meta(result.model.meta, Embedded)


def weights_answer(known: Collection[str]) -> Check:
    """Return the check of which files a site lacks: a list of SHA-256 among those that there are."""

    def check(result: Result) -> None:
        missing = result.model.meta.get("missing", [])
        if not isinstance(missing, list):
            raise ProtocolError("what it lacks is not a list of files")
        if unknown := [each for each in missing if not (isinstance(each, str) and each in known)]:
            raise ProtocolError(f"it asks for a file {unknown[0]!r} that is no part of the encoder")

    return check


def of_most(descriptions: Mapping[str, Description]) -> list[str]:
    """Return the sites that have one encoder and are more than those with any other, the first of equals.

    Arithmetic may differ between machines, all else may not.
    """
    groups: list[list[str]] = []
    for site in sorted(descriptions):
        info = descriptions[site].encoder
        same = (group for group in groups if set(descriptions[group[0]].encoder.differing(info)) <= {"dtype"})
        if (group := next(same, None)) is None:
            groups.append(group := [])
        group.append(site)
    return max(groups, key=len, default=[])


def _check_evaluation(said: Evaluation, classes: int) -> None:
    _check_shape("confusion matrix", said.confusion, (classes, classes))
    if said.confidence:
        _check_shape("table of confidence", said.confidence, CONFIDENCE_SHAPE)
    _check_counts(itertools.chain(*said.confusion, *said.confidence))
    _check_finite((said.loss,))


def _check_shape(what: str, rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> None:
    if [len(row) for row in rows] != [shape[1]] * shape[0]:
        raise ProtocolError(f"a {what} is not {shape[0]} rows of {shape[1]} counts")


def _check_counts(counts: Iterable[int]) -> None:
    for count in counts:
        if not 0 <= count <= MAX_COUNT:
            raise ProtocolError(f"a count of {count}; expected 0 to {MAX_COUNT}")


def _check_finite(values: Iterable[float | None]) -> None:
    for value in values:
        if value is not None and not math.isfinite(value):
            raise ProtocolError(f"a number of its answer is {value}")
