"""What a controller can ask for, over real endpoints: relays, callbacks, deadlines, who is missing, who is drawn."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import DataError, FederationError
from fedbio.federation import Controller, Executor, FLModel, ParamsType, Result, SiteContext, Task
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.model import WEIGHT
from fedbio.federation.sampling import sample, shuffle
from fedbio.tensors import manifest

SITES = ("site-1", "site-2", "site-3")
START = FLModel(params={"w": np.ones(3, np.float32)}, meta={"by": 2.0}, current_round=4)


class Do(Executor):
    """Does what a test says, under the name and kind that a site's policy allows."""

    kind = "train"
    leaves = "model"

    def __init__(self, answer: Callable[[FLModel, SiteContext], FLModel]) -> None:
        self.answer = answer

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        return self.answer(model, context)


def number(context: SiteContext) -> int:
    return int(context.site[-1])


def grow(model: FLModel, context: SiteContext) -> FLModel:
    """Multiply by what the task says and add the site's number: the order of visits can be told from the result."""
    step = np.float32(number(context))
    params = {name: value * np.float32(model.meta["by"]) + step for name, value in model.params.items()}
    return FLModel(params=params, metrics={"seen": float(model.params["w"][0])}, meta={WEIGHT: 5})


def fail(model: FLModel, context: SiteContext) -> FLModel:
    raise DataError("a.fasta:1: wrong")


def events(federation: Any, name: str) -> list[dict[str, Any]]:
    lines = (Path(federation.folder) / "server" / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == name]


@pytest.fixture
def ask(federation: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a function of a controller at a server with three sites, and return what it returns."""

    def run(work: Callable[[Controller], Any], tasks: dict[str, Any], **limits: Any) -> Any:
        class Asks(Controller):
            def run(self) -> None:
                found.append(work(self))

        found: list[Any] = []
        # in the place of the workflow of `federation.jobs`
        monkeypatch.setattr("fedbio.federation.workflows.classify.Classify", lambda runtime, job: Asks(runtime))
        server = federation.start(federation.server(federation.jobs(**limits)))
        sites = [
            federation.start(federation.site(site, {"do": Do(tasks.get(site, tasks.get("any", grow)))}))
            for site in SITES
        ]
        try:
            server.result(30)
        finally:
            for each in sites:
                each.exception(30)
        return found[0]

    return run


def test_relay_gives_each_site_what_the_one_before_made(ask: Any) -> None:
    order = ["site-3", "site-1", "site-2"]
    seen: list[str] = []
    results = ask(lambda c: c.relay("do", START, order, on_result=lambda each: seen.append(each.site)), {})
    # 1 -> 1*2+3 = 5 -> 5*2+1 = 11 -> 11*2+2 = 24
    assert [(each.site, each.model.params["w"].tolist()) for each in results] == [
        ("site-3", [5.0] * 3),
        ("site-1", [11.0] * 3),
        ("site-2", [24.0] * 3),
    ]
    assert [each.model.metrics["seen"] for each in results] == [1.0, 5.0, 11.0]
    assert seen == order


def test_relay_takes_differences_and_abstentions(ask: Any) -> None:
    def difference(model: FLModel, context: SiteContext) -> FLModel:
        if context.site == "site-2":
            return FLModel(meta={WEIGHT: 0})
        change = {"w": np.full(3, number(context), np.float32)}
        return FLModel(params=change, params_type=ParamsType.DIFF, meta={WEIGHT: 5})

    results = ask(
        lambda c: c.relay("do", START, SITES, weights=dict.fromkeys(SITES, 5)),
        {"any": difference},
    )
    assert [each.model.params["w"].tolist() for each in results] == [[2.0] * 3, [2.0] * 3, [5.0] * 3]
    assert {each.model.params_type for each in results} == {ParamsType.FULL}


BAD: dict[str, tuple[Callable[[FLModel, SiteContext], FLModel], str]] = {
    "fails": (fail, "its own data are refused"),
    "shape": (lambda *_: FLModel(params={"w": np.ones(2, np.float32)}, meta={WEIGHT: 5}), "expected float32 [3]"),
    "nan": (lambda *_: FLModel(params={"w": np.full(3, np.nan, np.float32)}, meta={WEIGHT: 5}), "not finite"),
    "weight": (lambda m, _: FLModel(params=dict(m.params), meta={WEIGHT: 6}), "above the 5 examples"),
}


@pytest.mark.parametrize("kind", BAD)
def test_relay_skips_a_site_that_fails_and_says_why(federation: Any, ask: Any, kind: str) -> None:
    bad, reason = BAD[kind]
    results = ask(
        lambda c: c.relay("do", START, SITES, min_responses=2, weights=dict.fromkeys(SITES, 5)), {"site-2": bad}
    )
    # 1*2+1 = 3, then site-3 gets it: 3*2+3 = 9
    assert [(each.site, each.model.params["w"][0]) for each in results] == [("site-1", 3.0), ("site-3", 9.0)]
    [skipped] = events(federation, "site skipped")
    assert (skipped["site"], skipped["round"]) == ("site-2", 4)
    assert reason in skipped["reason"]


def test_relay_skips_a_site_past_its_deadline_and_refuses_what_it_sends_later(federation: Any, ask: Any) -> None:
    release = threading.Event()

    def slow(model: FLModel, context: SiteContext) -> FLModel:
        assert release.wait(30)
        return grow(model, context)

    def work(controller: Controller) -> list[Result]:
        results = controller.relay("do", START, SITES, min_responses=2, deadline_s=1.5)
        release.set()
        # it answers this one when it is done with the other: its late result has come before
        assert len(controller.broadcast_and_wait("do", START, ["site-1"], expect=manifest(START.params))) == 1
        return results

    results = ask(work, {"site-1": slow})
    assert [each.site for each in results] == ["site-2", "site-3"]
    # as if site-1 had not been asked: 1*2+2 = 4, 4*2+3 = 11
    assert results[-1].model.params["w"].tolist() == [11.0] * 3
    assert [each["reason"] for each in events(federation, "site skipped")] == ["has not answered"]
    assert [each["reason"] for each in events(federation, "result refused")] == ["its task is not open"]


def test_relay_ends_as_soon_as_too_many_are_skipped(federation: Any, ask: Any) -> None:
    with pytest.raises(
        FederationError, match=r"at most 2 of 3 sites can answer, 3 are needed; site-1: failed: its own"
    ):
        ask(lambda c: c.relay("do", START, SITES), {"site-1": fail})
    # nobody else was asked
    assert [each["sites"] for each in events(federation, "task sent")] == [["site-1"]]


def test_results_are_shown_as_they_come_and_returned_sorted(ask: Any) -> None:
    first = threading.Event()

    def in_turn(model: FLModel, context: SiteContext) -> FLModel:
        # site-1 answers only after the server has shown the results of both others
        assert context.site != "site-1" or first.wait(30)
        return grow(model, context)

    shown: list[str] = []

    def show(result: Result) -> None:
        shown.append(result.site)
        if len(shown) == 2:
            first.set()

    def work(controller: Controller) -> list[Result]:
        return controller.broadcast_and_wait("do", START, expect=ANY_TENSORS, on_result=show)

    results = ask(work, {"any": in_turn})
    assert [each.site for each in results] == list(SITES)
    assert shown[-1] == "site-1"
    assert sorted(shown) == list(SITES)


def test_what_a_callback_raises_ends_the_task(federation: Any, ask: Any) -> None:
    def refuse(result: Result) -> None:
        raise FederationError(f"{result.site} is enough")

    with pytest.raises(FederationError, match="site-2 is enough"):
        ask(lambda c: c.broadcast_and_wait("do", START, ["site-2"], expect=ANY_TENSORS, on_result=refuse), {})


def test_who_is_missing_is_told_with_the_reason(ask: Any) -> None:
    missing: dict[str, str] = {}

    def work(controller: Controller) -> list[Result]:
        return controller.broadcast_and_wait("do", START, expect=ANY_TENSORS, min_responses=1, missing=missing)

    assert [each.site for each in ask(work, {"site-3": fail})] == ["site-1", "site-2"]
    assert list(missing) == ["site-3"]
    assert missing["site-3"].startswith("failed: its own data")


def test_send_asks_one_after_the_other_until_one_does_it(ask: Any) -> None:
    result = ask(lambda c: c.send("do", START, ["site-3", "site-2"], expect=ANY_TENSORS), {"site-3": fail})
    assert result.site == "site-2"


def test_sample_is_the_same_whatever_the_order_and_whoever_else_is_here() -> None:
    names = [f"site-{place}" for place in range(20)]
    chosen = sample(names, 5, seed=1, number=3)
    assert chosen == sample(reversed(names), 5, seed=1, number=3)
    assert list(chosen) == sorted(chosen)
    assert len(chosen) == 5
    for absent in set(names) - set(chosen):
        assert sample([name for name in names if name != absent], 5, seed=1, number=3) == chosen
    assert sample(names, 30, seed=1, number=3) == tuple(sorted(names))
    # written down: another release must not choose others in the middle of a job
    assert chosen == ("site-10", "site-11", "site-12", "site-16", "site-6")


def test_every_site_is_drawn_as_often_and_every_order_comes() -> None:
    drawn = collections.Counter(
        site for number in range(3000) for site in sample(["a", "b", "c", "d", "e"], 2, seed=7, number=number)
    )
    # 1200 each; five standard deviations of a binomial of 3000 draws at 2/5 are 134
    assert len(drawn) == 5
    assert all(abs(count - 1200) < 134 for count in drawn.values())
    orders = {shuffle("abc", seed=0, number=number) for number in range(60)}
    assert len(orders) == 6
