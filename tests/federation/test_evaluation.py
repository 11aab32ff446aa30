"""Every model on every site's data over real endpoints, against a table computed here."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FederationError, FormatError, SettingsError
from fedbio.federation import Executor, FLModel, SiteContext, Task
from fedbio.federation.state import State
from fedbio.federation.workflows import evaluation
from fedbio.results import Metric
from fedbio.settings import JobsFile
from fedbio.tensors import write_file

SITES = ("site-1", "site-2", "site-3")
Params = dict[str, np.ndarray[Any, Any]]
Answer = Callable[[FLModel, SiteContext], FLModel]

FILES: dict[str, Params] = {
    "zero.safetensors": {"w": np.zeros(4, np.float32)},
    "one.safetensors": {"w": np.ones(4, np.float32)},
}


def data_of(site: str) -> np.ndarray[Any, Any]:
    """A site's examples, shape (30, 4), float32."""
    return np.random.default_rng(int(site[-1])).normal(size=(30, 4)).astype(np.float32)


def own_model(site: str) -> Params:
    """What a site submits: the mean of its data."""
    return {"w": data_of(site).mean(axis=0)}


def tried(params: Mapping[str, np.ndarray[Any, Any]], site: str) -> dict[str, float]:
    """Return the metrics of a model on a site's data."""
    distance = np.abs(data_of(site) - params["w"])
    return {"distance": float(distance.mean()), "worst": float(distance.max())}


class Script(Executor):
    """Answers one of a script's tasks."""

    kind = "train"
    leaves = "model"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls = 0

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        self.calls += 1
        return self.answer(model, context)


def script(**tasks: Answer) -> dict[str, Script]:
    """Executors of a site with a script that submits and tries models."""
    answers: dict[str, Answer] = {
        "deploy": lambda *_: FLModel(meta={"examples": 30}),
        "submit_model": lambda _, context: FLModel(params=own_model(context.site)),
        "evaluate": lambda model, context: FLModel(metrics=tried(model.params, context.site)),
        "end": lambda *_: FLModel(),
        **tasks,
    }
    return {f"client/{name}": Script(answer) for name, answer in answers.items()}


def fail(model: FLModel, context: SiteContext) -> FLModel:
    raise FederationError("the script ended with exit code 1")


def job(**settings: Any) -> JobsFile:
    what = {"workflow": "evaluation", "client": {"script": "try.py"}, "models": list(FILES), **settings}
    federation = {"join_deadline_s": 20, "round_deadline_s": 20, "heartbeat_s": 0.5}
    return JobsFile.model_validate({"jobs": [what], "federation": federation})


def start(federation: Any, what: JobsFile, sites: Mapping[str, Mapping[str, Script]]) -> tuple[Any, list[Any]]:
    (federation.folder / "try.py").write_text("")
    for name, params in FILES.items():
        write_file(federation.folder / name, params)
    server = federation.start(federation.server(what, code=federation.folder))
    return server, [federation.start(federation.site(name, {**script(), **sites.get(name, {})})) for name in SITES]


def run(federation: Any, what: JobsFile, sites: Mapping[str, Mapping[str, Script]] | None = None) -> None:
    server, joined = start(federation, what, sites or {})
    for each in (server, *joined):
        each.result(40)


def table(federation: Any) -> dict[tuple[str, str, str], str]:
    path = Path(federation.folder) / "server" / "models" / "evaluation" / "evaluation.csv"
    with open(path, newline="") as file:
        return {(row["model"], row["site"], row["metric"]): row["value"] for row in csv.DictReader(file)}


def expected() -> dict[tuple[str, str, str], float]:
    models = {**FILES, **{site: own_model(site) for site in SITES}}
    return {
        (name, site, metric): value
        for (name, params), site in itertools.product(models.items(), SITES)
        for metric, value in tried(params, site).items()
    }


def events(federation: Any, name: str) -> list[dict[str, Any]]:
    lines = (Path(federation.folder) / "server" / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == name]


def test_matrix_is_every_model_on_every_sites_data(federation: Any) -> None:
    run(federation, job())
    found = table(federation)
    assert {key: float(value) for key, value in found.items()} == expected()
    # by rows: the job's models in its order, then the sites'
    assert list(dict.fromkeys(model for model, _, _ in found)) == [*FILES, *SITES]
    state = State(federation.folder / "server")
    noted = {(row.model, row.party, row.metric): row.value for row in state.metrics("evaluation")}
    assert noted == expected()
    assert state.metrics("evaluation")[0] == Metric(
        "site-1", "one.safetensors", "test", 0, 0, "distance", expected()["one.safetensors", "site-1", "distance"]
    )
    state.close()


def test_sites_models_can_be_left_out(federation: Any) -> None:
    executors = {name: script() for name in SITES}
    run(federation, job(sites=False), executors)
    assert {model for model, _, _ in table(federation)} == set(FILES)
    assert all(each["client/submit_model"].calls == 0 for each in executors.values())


def test_who_submits_is_named_by_certificate(federation: Any) -> None:
    run(federation, job())
    submitted = {each["site"]: each for each in events(federation, "model submitted")}
    assert sorted(submitted) == list(SITES)
    folder = Path(federation.folder) / "server" / "models" / "evaluation" / "submitted"
    for site, each in submitted.items():
        assert each["bytes"] == (folder / f"{site}.safetensors").stat().st_size


def test_model_that_fails_at_a_site_leaves_an_empty_cell_with_its_reason(federation: Any) -> None:
    def picky(model: FLModel, context: SiteContext) -> FLModel:
        if not model.params["w"].any():
            raise FederationError("cannot load the model")
        return FLModel(metrics=tried(model.params, context.site))

    run(federation, job(), {"site-2": script(evaluate=picky)})
    found = table(federation)
    empty = {key for key, value in found.items() if not value}
    assert empty == {("zero.safetensors", "site-2", metric) for metric in ("distance", "worst")}
    assert {key: float(value) for key, value in found.items() if value} == {
        key: value for key, value in expected().items() if key not in empty
    }
    [event] = events(federation, "cell empty")
    assert (event["model"], event["site"]) == ("zero.safetensors", "site-2")
    assert event["reason"] == "failed: cannot load the model"


BAD_MODELS: dict[str, tuple[Answer, str]] = {
    "fails": (fail, "exit code 1"),
    "nothing": (lambda *_: FLModel(), "no tensors came where a model was asked for"),
    "not finite": (lambda *_: FLModel(params={"w": np.full(4, np.inf, np.float32)}), "not finite"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_site_without_a_model_has_an_empty_row_and_still_tries_the_others(federation: Any, kind: str) -> None:
    answer, reason = BAD_MODELS[kind]
    run(federation, job(), {"site-3": script(submit_model=answer)})
    found = table(federation)
    assert {model for (model, _, _), value in found.items() if not value} == {"site-3"}
    assert {float(value) for (model, _, _), value in found.items() if model == "zero.safetensors"} == {
        value for (model, _, _), value in expected().items() if model == "zero.safetensors"
    }
    empty = events(federation, "cell empty")
    assert [each["site"] for each in empty] == list(SITES)
    assert all(reason in each["reason"] for each in empty)


def test_site_that_refuses_the_script_has_empty_cells(federation: Any) -> None:
    refused = {"client/deploy": script(deploy=fail)["client/deploy"]}
    what = job().model_copy(update={"federation": job().federation.model_copy(update={"min_sites": 2})})
    run(federation, what, {"site-1": refused})
    found = table(federation)
    assert all(not value for (model, site, _), value in found.items() if "site-1" in (model, site))
    assert all(value for (model, site, _), value in found.items() if "site-1" not in (model, site))
    assert len(found) == 5 * 3 * 2


def test_flood_of_metrics_is_cut_and_strange_names_are_left_out(federation: Any) -> None:
    def flood(model: FLModel, context: SiteContext) -> FLModel:
        return FLModel(metrics={**{f"m{place:04}": 1.0 for place in range(5000)}, "a\nb": 1.0, "x" * 101: 1.0})

    run(federation, job(sites=False), {"site-1": script(evaluate=flood)})
    names = {metric for _, site, metric in table(federation) if site == "site-1"}
    assert names == {f"m{place:04}" for place in range(100)} | {"distance", "worst"}


def test_job_ends_when_no_site_could_try_any_model(federation: Any) -> None:
    sites = {name: script(evaluate=fail) for name in SITES}
    server, joined = start(federation, job(sites=False), sites)
    with pytest.raises(FederationError, match=r"no site could try any model; site-1: failed: .*exit code 1"):
        server.result(40)
    for each in joined:
        each.exception(40)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"models": ["try.py"]}, SettingsError, r"try\.py: expected safetensors files"),
        ({"models": [], "sites": False}, SettingsError, "no model to try"),
        ({"models": ["torn.safetensors"]}, FormatError, r"torn\.safetensors: not a sound safetensors file"),
    ],
)
def test_wrong_models_are_told_before_anybody_works(
    federation: Any, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    (federation.folder / "torn.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}")
    executors = {name: script() for name in SITES}
    server, joined = start(federation, job(**settings), executors)
    with pytest.raises(kind, match=message):
        server.result(40)
    for each in joined:
        each.exception(40)
    assert all(each.calls == 0 for tasks in executors.values() for each in tasks.values())


class Killed(BaseException):
    """Ends a server where no `except` of ours sees it."""


def test_killed_server_asks_for_no_model_and_tries_no_model_twice(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    executors = {name: script() for name in SITES}
    honest = evaluation.CrossSiteEvaluation.fill

    def deadly(self: Any, name: str, sites: Any) -> Any:
        if name == "site-1":
            raise Killed
        return honest(self, name, sites)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.CrossSiteEvaluation, "fill", deadly)
        server, joined = start(federation, job(), executors)
        with pytest.raises(Killed):
            server.result(40)
    again = federation.start(federation.server(job(), code=federation.folder))
    for each in (again, *joined):
        each.result(40)
    assert {key: float(value) for key, value in table(federation).items()} == expected()
    for tasks in executors.values():
        assert (tasks["client/submit_model"].calls, tasks["client/evaluate"].calls) == (1, 5)
