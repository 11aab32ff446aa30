"""Functions on what is about to leave or has just arrived, chained at both ends of a federation."""

from __future__ import annotations

__all__ = ["Chain", "ClipNorm", "ExcludeParameters", "Filter"]

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from fedbio.federation.model import FLModel


class Filter(Protocol):
    """Returns what takes a model's place; never changes the model that it was given."""

    def __call__(self, model: FLModel, *, task: str) -> FLModel:
        """Return `model` as it shall go on; `task` is the name of the task that it belongs to."""
        ...


@dataclass(frozen=True, slots=True)
class Chain:
    """Filters applied one after the other; an empty chain passes everything on as it is."""

    filters: Sequence[Filter] = ()

    def __call__(self, model: FLModel, *, task: str) -> FLModel:
        """Return the model that the last filter returned."""
        for each in self.filters:
            model = each(model, task=task)
        return model


@dataclass(frozen=True, slots=True)
class ExcludeParameters:
    """Hold back the parameters whose names match one of the patterns (``layers.0.*``), in the named tasks."""

    patterns: Sequence[str]
    tasks: Sequence[str] = ("train",)

    def __call__(self, model: FLModel, *, task: str) -> FLModel:
        """Return the model without the parameters that match."""
        if task not in self.tasks:
            return model
        kept = {
            name: value
            for name, value in model.params.items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        }
        return msgspec.structs.replace(model, params=kept)


@dataclass(frozen=True, slots=True)
class ClipNorm:
    """Scale all parameters of a model together so that their L2 norm is at most `limit`, in the named tasks."""

    limit: float
    tasks: Sequence[str] = ("train",)

    def __call__(self, model: FLModel, *, task: str) -> FLModel:
        """Return the model itself if it is short enough, else a scaled one of the same dtypes."""
        if task not in self.tasks or not model.params:
            return model
        # float64: squares of float32 parameters overflow float32 from 1.8e19 on
        norm = math.sqrt(sum(float(np.vdot(value, value)) for value in map(_as_float64, model.params.values())))
        if norm <= self.limit:
            return model
        scale = self.limit / norm
        scaled = {name: (value * scale).astype(value.dtype) for name, value in model.params.items()}
        return msgspec.structs.replace(model, params=scaled)


def _as_float64(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float64).ravel()
