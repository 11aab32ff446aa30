"""Tasks of the opt-in map: sums of products, then two coordinates per protein of a sample."""

from __future__ import annotations

__all__ = ["Project", "Scatter", "ShowMap"]

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbio.classifier.residues import Features, Residues
from fedbio.executors.shelf import Shelf
from fedbio.executors.statistics import abstains
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import WEIGHT, FLModel, Task
from fedbio.federation.workflows.study import Points, Sample, Study, meta, read_meta
from fedbio.results import MAP_COLUMNS, MAP_FILE, MapPoint, write_table


class Scatter(Executor):
    """Sums the outer products of standardized training features, of the columns that describe the whole protein."""

    name: ClassVar[str] = "scatter"
    kind: ClassVar[str] = "map"
    leaves: ClassVar[str] = "sums"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return one float64 matrix, shape (D, D), or abstain."""
        study = read_meta(model.meta, Study)
        whole = self.shelf.data(study, context).encoder.whole_width
        features = pooled(self.shelf.standardized(study, model.params, context).train.features)[:, :whole]
        if abstains(len(features), study, task.name, context):
            return FLModel(meta={WEIGHT: 0})
        wide = features.astype(np.float64)
        return FLModel(params={"products": wide.T @ wide}, meta={WEIGHT: len(features)})


class Project(Executor):
    """Places a sample of the site's proteins on the map."""

    name: ClassVar[str] = "project"
    kind: ClassVar[str] = "map"
    leaves: ClassVar[str] = "coordinates"

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return coordinates with class and split; no ids."""
        sample = read_meta(model.meta, Sample)
        data = self.shelf.standardized(sample.study, model.params, context)
        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        features = np.concatenate([pooled(part.features) for part in parts.values()])
        targets = np.concatenate([part.targets for part in parts.values()])
        splits = [split for split, part in parts.items() for _ in range(len(part))]
        # a sample in random order: a place in the list says nothing of a place in the file
        chosen = np.random.default_rng().permutation(len(features))[: sample.points]
        components = model.params["components"]
        places = features[chosen, : len(components)] @ components
        return FLModel(
            meta=meta(
                Points(
                    [
                        MapPoint(
                            context.site,
                            data.classes[targets[row]],
                            splits[row],
                            round(float(x), 3),
                            round(float(y), 3),
                        )
                        for row, (x, y) in zip(chosen, places, strict=True)
                    ]
                )
            )
        )


class ShowMap(Executor):
    """Keeps the map of all sites."""

    name: ClassVar[str] = "show_map"
    kind: ClassVar[str] = "map"
    leaves: ClassVar[str] = "control"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Write ``map.csv``; nothing but an empty answer leaves."""
        write_table(context.workspace / MAP_FILE, MAP_COLUMNS, read_meta(model.meta, Points).points)
        return FLModel()


def pooled(features: Features) -> NDArray[np.float32]:
    """Return one row per protein, shape (n, D): of embeddings of residues, their mean."""
    return features.means() if isinstance(features, Residues) else features
