"""A site's proteins and embeddings in memory, read once and standardized once, for all tasks of a study."""

from __future__ import annotations

__all__ = ["Shelf", "StandardizedData", "layers"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.classifier import SiteData, Standardizer, TrainData, load_site_data
from fedbio.errors import FederationError
from fedbio.federation.executor import SiteContext
from fedbio.federation.model import Parameters
from fedbio.federation.workflows.study import MEAN, SCALE, Study


@dataclass(frozen=True, slots=True)
class StandardizedData:
    """A site's data with standardized features."""

    train: TrainData
    validation: TrainData
    test: TrainData
    classes: tuple[str, ...]


class Shelf:
    """Keeps the data of one study; another study, or new embeddings, take its place."""

    def __init__(self) -> None:
        self._key: object = None
        self._data: SiteData | None = None
        self._standard_key: object = None
        self._standard: StandardizedData | None = None

    def data(self, study: Study, context: SiteContext) -> SiteData:
        """Return the site's data as they are."""
        if not context.embeddings.exists():
            raise FederationError(
                f"the proteins of {context.site} are not embedded yet; run a job with workflow: embed before this one"
            )
        key = (study, context.embeddings.stat().st_mtime_ns)
        if self._data is None or self._key != key:
            self._data = load_site_data(
                context.data,
                context.embeddings,
                study.classes,
                validation_fraction=study.validation_fraction,
                labels=context.labels,
                attention_residues=study.attention_residues,
            )
            self._key, self._standard = key, None
        return self._data

    def standardized(self, study: Study, params: Mapping[str, NDArray[Any]], context: SiteContext) -> StandardizedData:
        """Return the site's data standardized with the tensors that came with a task."""
        data = self.data(study, context)
        mean, scale = params[MEAN], params[SCALE]
        key = (mean.tobytes(), scale.tobytes())
        if self._standard is None or self._standard_key != key:
            # copied: a task's tensors lie in a buffer that is given back with the task
            standardizer = Standardizer(np.array(mean), np.array(scale))
            parts = {
                split: TrainData(standardizer.apply(part.features), part.targets, part.ids)
                for split, part in (("train", data.train), ("validation", data.validation), ("test", data.test))
            }
            self._standard, self._standard_key = StandardizedData(**parts, classes=data.classes), key
        return self._standard


def layers(params: Mapping[str, NDArray[Any]]) -> Parameters:
    """Return a model's parameters without what travels beside them."""
    return {name: value for name, value in params.items() if name.startswith(("attention.", "layers."))}
