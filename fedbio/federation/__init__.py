"""Controllers at the server, executors at the sites, and the run times that bring them together; no torch in here."""

from __future__ import annotations

__all__ = [
    "Chain",
    "ClipNorm",
    "Controller",
    "ExcludeParameters",
    "Executor",
    "FLModel",
    "Filter",
    "ParamsType",
    "Result",
    "Runtime",
    "ScriptController",
    "Server",
    "Site",
    "SiteContext",
    "Status",
    "Task",
]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbio.federation.controller import Controller, Runtime
    from fedbio.federation.executor import Executor, SiteContext
    from fedbio.federation.filters import Chain, ClipNorm, ExcludeParameters, Filter
    from fedbio.federation.model import FLModel, ParamsType, Result, Status, Task
    from fedbio.federation.server import Server
    from fedbio.federation.site import Site
    from fedbio.federation.workflows.custom import ScriptController

_MODULES = {
    "Controller": "fedbio.federation.controller",
    "Runtime": "fedbio.federation.controller",
    "Executor": "fedbio.federation.executor",
    "SiteContext": "fedbio.federation.executor",
    "Chain": "fedbio.federation.filters",
    "ClipNorm": "fedbio.federation.filters",
    "ExcludeParameters": "fedbio.federation.filters",
    "Filter": "fedbio.federation.filters",
    "FLModel": "fedbio.federation.model",
    "ParamsType": "fedbio.federation.model",
    "Result": "fedbio.federation.model",
    "Status": "fedbio.federation.model",
    "Task": "fedbio.federation.model",
    "Server": "fedbio.federation.server",
    "Site": "fedbio.federation.site",
    "ScriptController": "fedbio.federation.workflows.custom",
}
"""Where each name is: a script that needs the messages alone does not load the server."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
