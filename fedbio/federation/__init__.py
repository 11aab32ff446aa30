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

from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.filters import Chain, ClipNorm, ExcludeParameters, Filter
from fedbio.federation.model import FLModel, ParamsType, Result, Status, Task
from fedbio.federation.server import Server
from fedbio.federation.site import Site
from fedbio.federation.workflows.custom import ScriptController
