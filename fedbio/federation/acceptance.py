"""Decide whether a site's result may count: it matches what was sent, is finite, and claims no more than its data."""

from __future__ import annotations

__all__ = ["ANY_TENSORS", "Expectation"]

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedbio.errors import FedbioError
from fedbio.federation.model import IN_MEMORY, Delivery, ParamsType, Result, Status
from fedbio.federation.model_file import FileModel
from fedbio.tensors import check_matches, manifest
from fedbio.tensors.check import Manifest, check_manifest

ANY_TENSORS: Manifest = MappingProxyType({})
"""Expects at least one tensor, whatever its name and shape: what nobody knows beforehand, such as a first model."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What results of one task must look like.

    Parameters
    ----------
    manifest : mapping of str to (shape, dtype) or None
        What the tensors must be; None if none may come; `ANY_TENSORS` if any may.
    weights : mapping of str to int or None
        The registered number of proteins of each site: the most weight that it may claim. A result of weight 0
        abstains and carries no tensors. None if the task asks for no weight.
    params_type : ParamsType or None
        Whole models or differences; None takes either.
    delivery : Delivery
        Where the tensors must be; in a file their values were looked at while they came.
    check : callable, optional
        Given a result that is all this; raises a `FedbioError` if what it says may not count all the same.
    """

    manifest: Manifest | None = None
    weights: Mapping[str, int] | None = None
    params_type: ParamsType | None = ParamsType.FULL
    delivery: Delivery = IN_MEMORY
    check: Callable[[Result], None] | None = None

    @property
    def room(self) -> int:
        """Bytes that the tensors may have."""
        if self.manifest is ANY_TENSORS:
            return sys.maxsize // 2
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in (self.manifest or {}).values())

    def problem(self, result: Result) -> str | None:
        """Return why `result` may not count, or None if it may. Failed and refused tasks pass: they claim nothing."""
        if result.status is not Status.DONE:
            return "a task that was not done carries tensors" if _tensors(result) else None
        problem = self._mismatch(result)
        if problem is None and self.check is not None:
            try:
                self.check(result)
            except FedbioError as error:
                return str(error)
        return problem

    def _mismatch(self, result: Result) -> str | None:
        model = result.model
        for name, value in model.metrics.items():
            if not math.isfinite(value):
                return f"metric {name!r} is {value}"
        abstains = False
        if self.weights is not None:
            most, weight = self.weights.get(result.site, 0), model.weight
            if not math.isfinite(weight) or weight < 0:
                return f"weight {weight} is not a positive number"
            if weight > most:
                return (
                    f"weight {weight:g} is above the {most} examples that the site registered: its proteins, or "
                    "`examples:` of its settings"
                )
            abstains = weight == 0
        if abstains or self.manifest is None:
            return "tensors came where none were asked for" if _tensors(result) else None
        if self.params_type not in (None, model.params_type):
            return f"expected parameters of type {self.params_type}, found {model.params_type}"
        if model.optimizer_params:
            return "an optimizer's state came where none was asked for"
        if self.manifest is ANY_TENSORS and not model.params:
            return "no tensors came where a model was asked for"
        in_file = isinstance(model, FileModel)
        if in_file is not (self.delivery.kind == "file"):
            return f"its parameters came {'in a file' if in_file else 'in memory'}, expected: {self.delivery.kind}"
        try:
            if isinstance(model, FileModel):
                check_manifest(model.file.manifest, self.manifest)
            else:
                expected = manifest(model.params) if self.manifest is ANY_TENSORS else self.manifest
                check_matches(model.params, expected)
        except FedbioError as error:
            return str(error)
        return None


def _tensors(result: Result) -> bool:
    model = result.model
    return bool(model.params or model.optimizer_params) or isinstance(model, FileModel)
