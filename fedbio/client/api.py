"""The functions of the Client API: what a training script calls to take part in a federation.

Five lines make a script federated::

    import fedbio.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        ...  # load model.params, train
        flare.send(flare.FLModel(params=..., metrics={"accuracy": ...}))

Names and meanings are those of NVIDIA FLARE's Client API. Where its functions take a context (``ctx``), so do these,
and do not look at it: a script has one session, which its own thread or process knows.
"""

from __future__ import annotations

__all__ = [
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fedbio.client.model import FLModel
from fedbio.client.session import Session, current, enter

Function = Callable[..., Any]

METRIC = "accuracy"
"""What a single number is called that a function under `evaluate` returns: a job's default `selection.metric`."""


def init(rank: int | str | None = None, config_file: str | None = None) -> None:
    """Connect to the site that has started this script; to be called first, and once.

    Parameters
    ----------
    rank : int or str, optional
        Of this process among those that train together; by default that of torchrun. Only rank 0 talks to the site.
    config_file : str, optional
        Not looked at: a site tells its script by the environment how to reach it. It is here for scripts that were
        written for NVIDIA FLARE.

    Raises
    ------
    SettingsError
        If no site has started this script.
    """
    enter(rank)


def receive(timeout: float | None = None, ctx: object = None) -> FLModel | None:
    """Wait for the next model; until it is answered, the same one is returned again.

    With several ranks, all get the model of the first: every one of them has to call this, unless all have called
    `is_running` before.

    Parameters
    ----------
    timeout : float, optional
        Seconds to wait at most.

    Returns
    -------
    FLModel or None
        None if none came in time, or none will come any more.
    """
    return current().receive(timeout)


def send(model: FLModel, clear_cache: bool = True, ctx: object = None) -> None:
    """Answer the model that was received last, and wait until the site has the answer; on other ranks do nothing.

    Parameters
    ----------
    model : FLModel
        New parameters, metrics, or both.
    clear_cache : bool
        Let go of the parameters in `model`, which take memory and are not needed any more.

    Raises
    ------
    RuntimeError
        If there is nothing to answer, or the model is empty.
    TypeError
        If something in it cannot travel; with its name.
    FederationError
        If the site does not take the answer, or is gone.
    """
    current().send(model, clear_cache)


def is_running(ctx: object = None) -> bool:
    """Wait until there is a model to work on, or there will be none any more; return whether there is one.

    With several ranks every one of them has to call this, once for each model: there they let go together of a model
    that the first rank has answered.
    """
    return current().is_running()


def system_info(ctx: object = None) -> dict[str, Any]:
    """Return what the site tells of itself and the job.

    Returns
    -------
    dict
        ``site_name``, ``job_id``, ``data`` (path of the site's proteins), ``workspace`` (a folder for the script's own
        files, which stays), ``device``, ``rounds``, ``workflow``; ``labels``, ``embeddings`` and ``threads``, or None.
    """
    return dict(current().about)


def get_config(ctx: object = None) -> dict[str, Any]:
    """Return how this script and its site talk to each other, under NVFlare's keys.

    Returns
    -------
    dict
        ``SITE_NAME`` and ``JOB_ID``; under ``TASK_EXCHANGE`` the names of tasks (``train_task_name``,
        ``eval_task_name``, ``submit_model_task_name``), ``exchange_format`` (``"pytorch"`` or ``"numpy"``: as what
        parameters come) and ``transfer_type``: ``"FULL"``, since what is received is always the whole model; what is
        sent says so itself (`FLModel.params_type`). Keys of NVFlare's pipes have no meaning here and are not there.
    """
    session = current()
    exchange = {
        "train_task_name": "train",
        "eval_task_name": "evaluate",
        "submit_model_task_name": "submit_model",
        "exchange_format": "pytorch" if session.form.kind("").startswith("torch") else "numpy",
        "transfer_type": "FULL",
    }
    about = session.about
    return {"SITE_NAME": about["site_name"], "JOB_ID": about["job_id"], "TASK_EXCHANGE": exchange}


def get_site_name(ctx: object = None) -> str:
    """Return the name of the site."""
    return str(current().about["site_name"])


def get_job_id(ctx: object = None) -> str:
    """Return the name of the job."""
    return str(current().about["job_id"])


def get_task_name(ctx: object = None) -> str:
    """Return what shall be done with the model that was received: ``"train"``, ``"evaluate"``, ``"submit_model"``."""
    return _session_with_task().task


def is_train(ctx: object = None) -> bool:
    """Whether the model that was received shall be trained."""
    return get_task_name() == "train"


def is_evaluate(ctx: object = None) -> bool:
    """Whether the model that was received shall only be evaluated: an answer has metrics."""
    return get_task_name() == "evaluate"


def is_submit_model(ctx: object = None) -> bool:
    """Whether the site's own best model is asked for: an answer has its parameters."""
    return get_task_name() == "submit_model"


def log(key: str, value: Any, data_type: Any = None, ctx: object = None, **kwargs: Any) -> None:
    """Show a metric at the server while the script goes on.

    Parameters
    ----------
    key : str
        Its name, such as ``"train_loss"``.
    value : float, str or dict of str to float
    data_type : AnalyticsDataType or str, optional
        Numbers (``SCALAR``, the default, ``SCALARS``, ``METRIC``, ``METRICS``) are sent; what else it is stays in the
        site's log: a text may quote the site's data.
    **kwargs
        ``global_step`` or ``step``: where on the curve it stands.
    """
    step = kwargs.get("global_step", kwargs.get("step"))
    current().log(key, value, data_type, step)


def shutdown(ctx: object = None) -> None:
    """End the connection to the site."""
    current().close()


def train(function: Function | None = None, **_: Any) -> Function:
    """Decorate a function that trains: it gets the received `FLModel` first, and returns the `FLModel` that is sent.

    Metrics that a function under `evaluate` has returned for the same model go with it. If that has answered the task,
    which asked for metrics only, the decorated function does nothing and returns None: a loop may evaluate and train in
    each turn, whatever is asked.
    """
    if function is None:
        return train

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        session = current()
        if session.evaluated and not session.has_model:
            # once for each answer: a script that calls this again waits for its next model
            session.evaluated = False
            return None
        answer = _call(function, args, kwargs)
        if not isinstance(answer, FLModel):
            raise TypeError(f"{function.__name__} returned {type(answer).__name__}; @train needs an FLModel")
        if session.measured is not None:
            answer.metrics, session.measured = session.measured, None
        send(answer)
        return answer

    return wrapper


def evaluate(function: Function | None = None, **_: Any) -> Function:
    """Decorate a function that evaluates: it gets the received `FLModel` first, and returns metrics by name.

    A single number is the metric ``"accuracy"``, by which a job chooses its best model unless it says otherwise. The
    metrics are sent at once if the task is to evaluate, else with what the function under `train` returns.
    """
    if function is None:
        return evaluate

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found = _call(function, args, kwargs)
        metrics = _by_name(found, function.__name__)
        session = current()
        if is_train():
            session.measured = metrics
        else:
            send(FLModel(metrics=metrics))
            session.evaluated = True
        return found

    return wrapper


def _by_name(found: Any, function: str) -> dict[str, Any]:
    """Return what a function under `evaluate` has returned as metrics by name."""
    if isinstance(found, dict):
        return found
    # a plain number, or an array or tensor of no dimensions, on whatever device
    if hasattr(found, "__float__") and getattr(found, "ndim", 0) == 0:
        return {METRIC: float(found)}
    raise TypeError(f"{function} returned {type(found).__name__}; @evaluate needs a number or a dict of metrics")


def _call(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with the received model in the place of its first argument."""
    model = receive()
    if model is None:
        raise RuntimeError("there is no model any more; call is_running() before the function")
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    first = next(iter(bound.signature.parameters))
    bound.arguments[first] = model
    return function(*bound.args, **bound.kwargs)


def _session_with_task() -> Session:
    session = current()
    if not session.task:
        raise RuntimeError("no model has come yet; call receive() or is_running() first")
    return session
