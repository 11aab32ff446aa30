"""Controllers that fedbio does not know: a class in a file beside the job's file."""

from __future__ import annotations

__all__ = ["ScriptController", "load"]

import importlib.util
from collections.abc import Callable
from typing import Any, cast

from fedbio.errors import SettingsError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.workflows.deployment import Deployment
from fedbio.settings_jobs import CustomJob


class ScriptController(Controller):
    """The base of a controller of your own.

    Attributes
    ----------
    settings : dict
        What the job's ``settings`` say.
    rounds : int
        The job's ``rounds``.
    """

    def __init__(self, runtime: Runtime, job: CustomJob) -> None:
        super().__init__(runtime)
        self.settings, self.rounds = dict(job.settings), job.rounds
        # a script is brought to the sites by the first call of `trainers`
        self._deployment = None if job.client is None else Deployment(self, job, job.rounds)

    def trainers(self) -> dict[str, int]:
        """Return the sites that are here and have the script, with the examples that each has registered."""
        if self._deployment is None:
            raise SettingsError(f"job {self.job}: has no client; name the script that runs at the sites")
        return {site: self._deployment.examples[site] for site in self._deployment.sites()}

    def end(self) -> None:
        """Tell the scripts, if there are some, that there is no more to do; done by itself after `run`."""
        if self._deployment is not None:
            self._deployment.end()


class _Custom(Controller):
    """Runs a controller of one's own, and ends its scripts: else they would wait until the server ends."""

    def __init__(self, runtime: Runtime, controller: Controller) -> None:
        super().__init__(runtime)
        self._controller = controller

    def run(self) -> Any:
        found = self._controller.run()
        if isinstance(self._controller, ScriptController):
            self._controller.end()
        return found


def load(runtime: Runtime, job: CustomJob) -> Controller:
    """Return the job's controller.

    Raises
    ------
    SettingsError
        If the file has no such controller, or cannot be loaded; with its own error.
    """
    name, _, kind = job.controller.partition(":")
    path = runtime.code / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SettingsError(f"job {job.name}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, Controller)):
        raise SettingsError(f"job {job.name}: {path} has no class {kind} that is a fedbio.federation.Controller")
    return _Custom(runtime, cast("Callable[[Runtime, CustomJob], Controller]", found)(runtime, job))
