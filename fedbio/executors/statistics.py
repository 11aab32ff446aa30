"""Tasks whose answers are counts, and sums over many proteins."""

from __future__ import annotations

__all__ = ["Describe", "SumMoments", "abstains"]

import logging
from typing import ClassVar

from fedbio.classifier import moments
from fedbio.executors.shelf import Shelf
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import WEIGHT, FLModel, Task
from fedbio.federation.workflows.study import Description, Study, meta, read_meta

log = logging.getLogger(__name__)


class Describe(Executor):
    """Counts the site's proteins by class and split; refuses labels that the federation does not know."""

    name: ClassVar[str] = "describe"
    kind: ClassVar[str] = "statistics"
    leaves: ClassVar[str] = "counts"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return counts and the encoder."""
        data = self.shelf.data(read_meta(model.meta, Study), context)
        context.record.classes, context.record.encoder = list(data.classes), data.encoder
        context.record.data = data.describe(synthetic=context.synthetic)
        return FLModel(meta=meta(Description(data.counts, data.encoder)))


class SumMoments(Executor):
    """Sums the training features and their squares."""

    name: ClassVar[str] = "moments"
    kind: ClassVar[str] = "statistics"
    leaves: ClassVar[str] = "sums"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return two float64 sums, or abstain."""
        study = read_meta(model.meta, Study)
        features = self.shelf.data(study, context).train.features
        if abstains(len(features), study, task.name, context):
            return FLModel(meta={WEIGHT: 0})
        found = moments(features)
        return FLModel(params={"sum": found.total, "squares": found.squares}, meta={WEIGHT: found.count})


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
