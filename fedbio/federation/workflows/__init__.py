"""Controllers, one file per federated computation."""

from __future__ import annotations

__all__ = ["controller_for"]

import importlib
from collections.abc import Callable
from typing import cast

from fedbio.federation.controller import Controller, Runtime
from fedbio.settings import Job

_CONTROLLERS = {
    "embed": ("embed", "Embed"),
    "classify": ("classify", "Classify"),
    "projection": ("projection", "Projection"),
    "fedavg": ("script_fedavg", "ScriptFedAvg"),
    "cyclic": ("cyclic", "Cyclic"),
    "evaluation": ("evaluation", "CrossSiteEvaluation"),
    "swarm": ("swarm", "Swarm"),
    "split": ("split", "Split"),
    "statistics": ("statistics", "Statistics"),
    "custom": ("custom", "load"),
}
"""By the name of the workflow: the module in this package, and its class, or what finds it."""


def controller_for(runtime: Runtime, job: Job) -> Controller:
    """Return the controller that runs a job; only its own module is loaded."""
    module, name = _CONTROLLERS[job.workflow]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return cast("Callable[[Runtime, Job], Controller]", found)(runtime, job)
