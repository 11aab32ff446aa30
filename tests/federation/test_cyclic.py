"""Cyclic weight transfer over real endpoints, against a plain loop over the sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FederationError, SettingsError
from fedbio.federation import Executor, FLModel, ParamsType, SiteContext, Task
from fedbio.federation.sampling import shuffle
from fedbio.federation.state import State
from fedbio.federation.workflows import cyclic
from fedbio.results import Metric
from fedbio.settings import JobsFile
from fedbio.tensors import open_file, write_file

SITES = ("site-1", "site-2", "site-3")
Params = dict[str, np.ndarray[Any, Any]]
START: Params = {
    "weight": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "bias": np.zeros(3, np.float32),
}


def data_of(site: str) -> np.ndarray[Any, Any]:
    """A site's own examples, shape (20, 4), float32; another distribution at each."""
    place = int(site[-1])
    return np.random.default_rng(place).normal(place, 1.0, (20, 4)).astype(np.float32)


def descend(params: Mapping[str, np.ndarray[Any, Any]], site: str, number: int) -> Params:
    """Take a step of gradient descent of a linear map that shall return zero; not the same in every round."""
    features, rate = data_of(site), np.float32(0.01 / (number + 1))
    error = features @ params["weight"].T + params["bias"] + np.float32(0.5)
    slope = {"weight": error.T @ features / np.float32(20), "bias": error.mean(axis=0)}
    return {name: value - rate * slope[name] for name, value in params.items()}


class Script(Executor):
    """Answers one of a script's tasks."""

    kind = "train"
    leaves = "model"

    def __init__(self, answer: Callable[[FLModel, SiteContext], FLModel]) -> None:
        self.answer = answer
        self.calls: list[tuple[str, int]] = []

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        self.calls.append((context.site, model.current_round))
        return self.answer(model, context)


def train(model: FLModel, context: SiteContext) -> FLModel:
    made = descend(model.params, context.site, model.current_round)
    loss = float(np.abs(made["bias"]).sum())
    return FLModel(params=made, metrics={"loss": loss}, meta={"weight": 20})


def script(**tasks: Callable[[FLModel, SiteContext], FLModel]) -> dict[str, Script]:
    """Executors of a site with a script that trains."""
    answers: dict[str, Callable[[FLModel, SiteContext], FLModel]] = {
        "deploy": lambda *_: FLModel(meta={"examples": 20}),
        "init": lambda *_: FLModel(params=START),
        "train": train,
        "end": lambda *_: FLModel(),
        **tasks,
    }
    return {f"client/{name}": Script(answer) for name, answer in answers.items()}


def job(*, limits: Mapping[str, Any] | None = None, **settings: Any) -> JobsFile:
    what = {
        "workflow": "cyclic",
        "client": {"script": "train.py", "initial": "train.py:model"},
        "rounds": 2,
        **settings,
    }
    federation = {"join_deadline_s": 20, "round_deadline_s": 20, "heartbeat_s": 0.5, **(limits or {})}
    return JobsFile.model_validate({"jobs": [what], "federation": federation})


def start(federation: Any, what: JobsFile, sites: Mapping[str, Mapping[str, Script]]) -> tuple[Any, list[Any]]:
    (federation.folder / "train.py").write_text("")
    server = federation.start(federation.server(what, code=federation.folder))
    return server, [federation.start(federation.site(name, sites[name])) for name in SITES]


def run(federation: Any, what: JobsFile, sites: Mapping[str, Mapping[str, Script]] | None = None) -> None:
    server, joined = start(federation, what, sites or {name: script() for name in SITES})
    for each in (server, *joined):
        each.result(40)


def plain(orders: Sequence[Sequence[str]]) -> list[Params]:
    """Return the model after each time around, from a loop over the sites."""
    model, kept = START, []
    for number, order in enumerate(orders):
        for site in order:
            model = descend(model, site, number)
        kept.append(model)
    return kept


def models(federation: Any) -> Path:
    return Path(federation.folder) / "server" / "models" / "cyclic"


def same(path: Path, expected: Params) -> None:
    found = open_file(path)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def events(federation: Any, name: str) -> list[dict[str, Any]]:
    lines = (Path(federation.folder) / "server" / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == name]


def test_equals_a_plain_loop_over_the_sites(federation: Any) -> None:
    sites = {name: script() for name in SITES}
    run(federation, job(rounds=3), sites)
    expected = plain([SITES] * 3)
    for number, each in enumerate(expected, start=1):
        same(models(federation) / f"round-{number:05}.safetensors", each)
    same(models(federation) / "last.safetensors", expected[-1])
    # nothing else than the rounds and the step to go on from is kept
    assert sorted(path.name for path in models(federation).rglob("*.safetensors")) == [
        "last.safetensors", "round-00001.safetensors", "round-00002.safetensors", "round-00003.safetensors",
        "round-00009.safetensors",
    ]  # fmt: skip
    assert all(executors["client/end"].calls == [(name, 0)] for name, executors in sites.items())


def test_order_is_drawn_anew_for_each_time_around(federation: Any) -> None:
    orders = [shuffle(SITES, seed=4, number=number) for number in range(4)]
    assert len(set(orders)) > 1
    run(federation, job(rounds=4, order="random", seed=4))
    same(models(federation) / "last.safetensors", plain(orders)[-1])
    visits = [(each["site"], each["round"]) for each in events(federation, "model saved")[1:]]
    assert visits == [(site, number) for number, order in enumerate(orders) for site in order]


def test_begins_with_the_jobs_own_model(federation: Any) -> None:
    write_file(federation.folder / "first.safetensors", START)
    run(federation, job(rounds=1, model="first.safetensors", client={"script": "train.py"}))
    same(models(federation) / "last.safetensors", plain([SITES])[-1])


def test_differences_are_added(federation: Any) -> None:
    def difference(model: FLModel, context: SiteContext) -> FLModel:
        made = descend(model.params, context.site, model.current_round)
        change = {name: value - model.params[name] for name, value in made.items()}
        return FLModel(params=change, params_type=ParamsType.DIFF, meta={"weight": 20})

    run(federation, job(rounds=1), {name: script(train=difference) for name in SITES})
    found = open_file(models(federation) / "last.safetensors")
    for name, value in plain([SITES])[-1].items():
        # (a + (b - a)) is not b to the last bit
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)


def test_metrics_are_noted_by_site_and_round(federation: Any) -> None:
    run(federation, job(rounds=1))
    model, expected = START, []
    for site in SITES:
        model = descend(model, site, 0)
        expected.append(Metric(site, "cyclic", "train", 0, 0, "loss", float(np.abs(model["bias"]).sum())))
    state = State(federation.folder / "server")
    assert state.metrics("cyclic") == expected
    state.close()


def test_site_that_fails_is_skipped_and_may_come_back(federation: Any) -> None:
    def unsteady(model: FLModel, context: SiteContext) -> FLModel:
        if model.current_round == 0:
            raise FederationError("the script ended with exit code 1")
        return train(model, context)

    run(
        federation,
        job(limits={"min_sites": 2}),
        {**{name: script() for name in SITES}, "site-2": script(train=unsteady)},
    )
    same(models(federation) / "last.safetensors", plain([("site-1", "site-3"), SITES])[-1])
    [skipped] = events(federation, "site skipped")
    assert (skipped["site"], skipped["round"]) == ("site-2", 0)
    assert "exit code 1" in skipped["reason"]


def test_job_ends_when_too_many_sites_fail(federation: Any) -> None:
    def fail(model: FLModel, context: SiteContext) -> FLModel:
        raise FederationError("the script ended with exit code 1")

    sites = {"site-1": script(), "site-2": script(train=fail), "site-3": script(train=fail)}
    server, joined = start(federation, job(limits={"min_sites": 2}), sites)
    with pytest.raises(FederationError, match=r"at most 1 of 3 sites can answer, 2 are needed; site-2: .*; site-3: "):
        server.result(40)
    for each in joined:
        each.exception(40)


def test_claimed_weight_is_held_against_what_the_site_registered(federation: Any) -> None:
    def boast(model: FLModel, context: SiteContext) -> FLModel:
        return FLModel(params=descend(model.params, context.site, 0), meta={"weight": 21})

    run(
        federation,
        job(rounds=1, limits={"min_sites": 2}),
        {**{n: script() for n in SITES}, "site-3": script(train=boast)},
    )
    [skipped] = events(federation, "site skipped")
    assert "above the 20 examples" in skipped["reason"]
    same(models(federation) / "last.safetensors", plain([("site-1", "site-2")])[-1])


def test_job_without_a_first_model_is_refused(federation: Any) -> None:
    server, joined = start(federation, job(client={"script": "train.py"}), {name: script() for name in SITES})
    with pytest.raises(SettingsError, match=r"no initial model; name a safetensors file \(model\) or a function"):
        server.result(40)
    for each in joined:
        each.exception(40)


POINTS = ("before the first model", "note", "model", "between two sites", "end of a round", "last name")


class Killed(BaseException):
    """Ends a server at a named point, where no `except` of ours sees it."""


def kill_at(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server die at a point of the second time around, or of the beginning or the end."""

    def die(owner: Any, name: str, when: Callable[..., bool], *, after: bool = False) -> None:
        honest = getattr(owner, name)

        def deadly(*given: Any, **named: Any) -> Any:
            found = honest(*given, **named) if after else None
            if when(*given, **named):
                raise Killed(point)
            return found if after else honest(*given, **named)

        monkeypatch.setattr(owner, name, deadly)

    def fifth(progress: Any) -> bool:
        return bool(progress.round == 5)

    match point:
        case "before the first model":
            die(State, "save", lambda *_: True)
        case "note":
            die(State, "save", lambda self, job, run, progress, params=None: fifth(progress))
        case "model":
            # the file is written, the row that names it is not
            die(State, "store", lambda self, job, name, params: name.endswith("00005"), after=True)
        case "between two sites":
            die(State, "save", lambda self, job, run, progress, params=None: fifth(progress), after=True)
        case "end of a round":
            die(cyclic.Cyclic, "keep", lambda self, name: name == "round-00002")
        case "last name":
            die(cyclic.Cyclic, "keep", lambda self, name: name == "last")


@pytest.mark.parametrize("point", POINTS)
def test_killed_server_goes_on_with_the_next_site_to_the_same_bits(
    federation: Any, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = job(rounds=3, order="random", seed=1)
    sites = {name: script() for name in SITES}
    with monkeypatch.context() as patch:
        kill_at(point, patch)
        server, joined = start(federation, what, sites)
        with pytest.raises(Killed):
            server.result(40)
    again: Future[None] = federation.start(federation.server(what, code=federation.folder))
    for each in (again, *joined):
        each.result(40)
    orders = [shuffle(SITES, seed=1, number=number) for number in range(3)]
    write_file(federation.folder / "expected.safetensors", dict(sorted(plain(orders)[-1].items())))
    found, expected = (
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (models(federation) / "last.safetensors", federation.folder / "expected.safetensors")
    )
    assert found == expected
    # what was saved before was not asked for again, and the site that was being visited had its answer still
    visits = sum(len(executors["client/train"].calls) for executors in sites.values())
    assert visits == 9


def test_killed_server_goes_on_behind_a_site_that_was_skipped(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(model: FLModel, context: SiteContext) -> FLModel:
        raise FederationError("the script ended with exit code 1")

    what = job(rounds=1, limits={"min_sites": 2})
    sites = {"site-1": script(train=never), "site-2": script(), "site-3": script()}
    honest = State.save

    def deadly(self: State, *given: Any, **named: Any) -> None:
        honest(self, *given, **named)
        if given[2].round == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", deadly)
        server, joined = start(federation, what, sites)
        with pytest.raises(Killed):
            server.result(40)
    again = federation.start(federation.server(what, code=federation.folder))
    for each in (again, *joined):
        each.result(40)
    same(models(federation) / "last.safetensors", plain([("site-2", "site-3")])[-1])
    assert [len(sites[name]["client/train"].calls) for name in SITES] == [1, 1, 1]
