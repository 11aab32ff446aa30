"""Tasks whose answers are counts, and sums over many proteins."""

from __future__ import annotations

__all__ = ["CountProteins", "Describe", "SumMoments", "abstains"]

import bisect
import itertools
import logging
from collections import Counter
from typing import ClassVar

import numpy as np

from fedbio.classifier import moments
from fedbio.classifier.residues import Residues
from fedbio.executors.shelf import Shelf
from fedbio.executors.study_record import study_record
from fedbio.executors.suppression import suppress
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import WEIGHT, FLModel, Task
from fedbio.federation.workflows.counting import COUNT, SPLITS, Counted, CountSpec
from fedbio.federation.workflows.study import Description, Study, meta, read_meta
from fedbio.proteins import read

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = SPLITS


class Describe(Executor):
    """Counts the site's proteins by class and split; refuses labels that the federation does not know."""

    name: ClassVar[str] = "describe"
    kind: ClassVar[str] = "statistics"
    leaves: ClassVar[str] = "counts"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return counts and the encoder."""
        study = read_meta(model.meta, Study)
        data = self.shelf.data(study, context)
        with study_record(context, study.place) as record:
            record.classes, record.encoder = list(data.classes), data.encoder
            record.data = data.describe(synthetic=context.synthetic)
        return FLModel(meta=meta(Description(data.counts, data.encoder)))


class SumMoments(Executor):
    """Sums the training features and their squares."""

    name: ClassVar[str] = "moments"
    kind: ClassVar[str] = "statistics"
    leaves: ClassVar[str] = "sums"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return two float64 sums, and of how many residues if they are over these, or abstain."""
        study = read_meta(model.meta, Study)
        features = self.shelf.data(study, context).train.features
        if abstains(len(features), study, task.name, context):
            return FLModel(meta={WEIGHT: 0})
        found = moments(features)
        params = {"sum": found.total, "squares": found.squares}
        if isinstance(features, Residues):
            params["count"] = np.array([found.count], np.float64)
        return FLModel(params=params, meta={WEIGHT: len(features)})


class CountProteins(Executor):
    """Counts the site's proteins by class and split, and by length; needs no embeddings.

    Both tables count every protein once, and neither a total nor a count below the job's `min_count`, or the site's own
    if that is higher, leaves the site: see `fedbio.executors.suppression.suppress` for what is held back with them,
    what that guarantees and what not.
    """

    name: ClassVar[str] = COUNT
    kind: ClassVar[str] = "statistics"
    leaves: ClassVar[str] = "counts"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the counts that may be told; the file is read once, protein by protein."""
        spec = read_meta(model.meta, CountSpec)
        spec.check()
        classes: Counter[tuple[str | None, str]] = Counter()
        lengths: Counter[int] = Counter()
        for protein in read(context.data, labels=context.labels, classes=spec.classes):
            split = TEST if protein.set == TEST else VALIDATION if protein.validation else TRAIN
            classes[protein.target, split] += 1
            lengths[bisect.bisect_left(spec.length_bins, len(protein.sequence))] += 1
        rows = (*spec.classes, None)
        least = max(spec.min_count, context.policy.min_count)
        told = suppress({cell: classes[cell] for cell in itertools.product(rows, SPLITS)}, least, salt=context.site)
        told_lengths = suppress(
            {place: lengths[place] for place in range(len(spec.length_bins) + 1)}, least, salt=context.site
        )
        counted = Counted([[told[row, split] for split in SPLITS] for row in rows], list(told_lengths.values()), least)
        by_class, by_length = counted.held_back
        if least > spec.min_count:
            text = f"the policy of {context.site} lets no count below {least} leave; the job asks for {spec.min_count}"
            log.info("%s", text)
            context.events.write("minimum raised", job=task.job, reason=text)
        log.info("counted held_back_by_class=%d held_back_by_length=%d", by_class, by_length)
        if by_class or by_length:
            context.remark(
                f"{context.site} held back {by_class} of {len(told)} counts by class and split and {by_length} of "
                f"{len(told_lengths)} by length: those below {least}, and others that would give them away."
            )
        return FLModel(meta=meta(counted))


def abstains(count: int, study: Study, task: str, context: SiteContext) -> bool:
    """Whether a site has too few training proteins to let sums over them, or a model trained on them, leave."""
    if count >= study.min_proteins:
        return False
    log.warning(
        "too few training proteins, this site abstains task=%s proteins=%d least=%d", task, count, study.min_proteins
    )
    context.remark(
        f"{context.site} has {count} training proteins, fewer than {study.min_proteins}, and abstains: "
        "a sum over so few would give single embeddings away."
    )
    return True
