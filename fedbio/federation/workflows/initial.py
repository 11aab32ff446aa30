"""The model that a job of a training script begins with: the job's own file, or what a site's script makes."""

from __future__ import annotations

__all__ = ["initial_model"]

from collections.abc import Sequence

from fedbio.errors import SettingsError
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.controller import Controller
from fedbio.federation.model import FLModel, Parameters
from fedbio.federation.workflows.script import EXCLUDE, INIT
from fedbio.tensors import open_file


def initial_model(
    controller: Controller,
    *,
    file: str | None,
    function: str | None,
    sites: Sequence[str],
    rounds: int,
    exclude: Sequence[str] = (),
) -> Parameters:
    """Return the model of round 0.

    Parameters
    ----------
    controller : Controller
        Of the job.
    file : str or None
        A safetensors file beside the job file.
    function : str or None
        What the script calls for a model, if there is no file.
    sites : sequence of str
        Who has the script; the first of them that makes a model is taken.
    rounds : int
        How many rounds there will be.
    exclude : sequence of str
        Patterns of the names of parameters that stay at the site.

    Raises
    ------
    SettingsError
        If the job names neither, or the file is not there.
    FormatError
        If the file is not a sound safetensors file.
    FederationError
        If no site can make a model; with the reasons of all.
    """
    if file is not None:
        path = controller.runtime.code / file
        if not path.is_file():
            raise SettingsError(f"job {controller.job}: model: {path} not found; put it beside the job file")
        return open_file(path)
    if function is None:
        raise SettingsError(
            f"job {controller.job}: no initial model; name a safetensors file (model) or a function of the script "
            "that returns one (client.initial)"
        )
    task = FLModel(meta={EXCLUDE: list(exclude)}, total_rounds=rounds)
    return controller.send(INIT, task, sites, expect=ANY_TENSORS).model.params
