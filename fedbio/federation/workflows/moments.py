"""Mean and scale of every feature over all sites' training proteins, from sums; no single vector leaves a site."""

from __future__ import annotations

__all__ = ["federated_standardizer", "federated_sums"]

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FederationError
from fedbio.federation.controller import Controller
from fedbio.federation.model import FLModel, Parameters, Result
from fedbio.federation.workflows.study import MEAN, SCALE, Study, meta
from fedbio.federation.workflows.study_checks import moments_answer
from fedbio.results import EncoderInfo

CONSTANT = 1e-5
"""A feature whose standard deviation is below this share of its size is constant, but for rounding."""


def federated_sums(
    controller: Controller,
    task: str,
    model: FLModel,
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    sites: list[str],
    *,
    check: Callable[[Result], None] | None = None,
) -> tuple[int, dict[str, NDArray[np.float64]]]:
    """Have sites send float64 sums over their training proteins; return how many proteins, and the sums of all.

    A site with too few proteins abstains. The order of addition is that of the sites' names. `check` is that of
    `Controller.broadcast_and_wait`.

    Raises
    ------
    FederationError
        If every site abstains.
    """
    expect = {name: (shape, np.dtype(np.float64)) for name, shape in shapes.items()}
    results = controller.broadcast_and_wait(task, model, sites, expect=expect, weights=counts, check=check)
    for abstained in (each.site for each in results if each.model.weight == 0):
        controller.runtime.record.remarks.append(
            f"{abstained} has too few training proteins and abstained from {task}."
        )
    given = [each.model for each in results if each.model.weight > 0]
    if not given:
        raise FederationError(
            f"job {controller.job}: every site has too few training proteins for {task}; lower training.min_proteins "
            "if the sites agree, or bring more proteins"
        )
    sums = {name: np.sum([model.params[name] for model in given], axis=0) for name in shapes}
    return round(sum(model.weight for model in given)), sums


def federated_standardizer(
    controller: Controller, study: Study, encoder: EncoderInfo, counts: Mapping[str, int]
) -> Parameters:
    """Return the mean and the scale of each feature, float32, shape (width,).

    They are over proteins, or over residues if the embeddings are of these. A site that tells of more or fewer residues
    than its proteins can have is left out.
    """
    sites = [site for site in controller.sites() if site in counts]
    shapes: dict[str, tuple[int, ...]] = {"sum": (encoder.width,), "squares": (encoder.width,)}
    if encoder.pooling == "residues":
        shapes["count"] = (1,)
    proteins, sums = federated_sums(
        controller, "moments", FLModel(meta=meta(study)), shapes, counts, sites,
        check=moments_answer(study.attention_residues),
    )  # fmt: skip
    count = float(sums["count"][0]) if "count" in sums else proteins
    mean = sums["sum"] / count
    # float64: the difference of two nearly equal numbers; rounding may make it slightly negative
    mean_square = sums["squares"] / count
    scale = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    scale[scale <= CONSTANT * np.sqrt(mean_square)] = 1.0
    return {MEAN: mean.astype(np.float32), SCALE: scale.astype(np.float32)}
