"""Where models are at the server makes no difference to their bits."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbio.errors import FederationError, PeerUnreachable, SettingsError
from fedbio.federation import Chain, ClipNorm, FLModel, messages
from fedbio.federation.model import WEIGHT
from fedbio.federation.outbox import Outbox
from fedbio.results import read_party

F = np.float32
SITES = ("site-1", "site-2", "site-3")


@pytest.fixture
def federations(federation: Any) -> Callable[[], Any]:
    """Makes federations that have nothing but their kits in common."""
    numbers = itertools.count(1)

    def make() -> Any:
        folder = federation.folder / f"run-{next(numbers)}"
        shutil.copytree(federation.folder / "kits", folder / "kits")
        return type(federation)(folder, federation.pool)

    return make


def jobs(federation: Any, aggregation: str, **options: Any) -> Any:
    """Return jobs whose models are aggregated in a certain way."""
    what = federation.jobs(**options)
    return what.model_copy(update={"jobs": [what.jobs[0].model_copy(update={"aggregation": aggregation})]})


def learning(federation: Any) -> Any:
    """Executors of a site whose training adds numbers that no sum of two of them is exact for."""
    executors = federation.fakes()

    def train(model: FLModel, context: Any) -> FLModel:
        dice = np.random.default_rng([int(context.site[-1]), model.current_round])
        layers = {name: value for name, value in sorted(model.params.items()) if name[:6] == "layers"}
        return FLModel(
            params={name: value + dice.standard_normal(value.shape).astype(F) for name, value in layers.items()},
            metrics={"validation_accuracy": 0.9 - 0.1 * abs(model.current_round - 2), "train_loss": 0.5},
            meta={WEIGHT: 10 * int(context.site[-1])},
        )

    executors["train"].answer = train
    return executors


def run(federation: Any, executors: dict[str, Any] | None = None, **options: Any) -> Any:
    """Run a study with three sites; return what was saved as the best model, and the server's events."""
    saved: list[Any] = []
    what = jobs(federation, options.pop("aggregation", "memory"), **options)
    server = federation.start(federation.server(what, save_model=lambda *found: saved.append(found)))
    executors = executors or {}
    sites = [federation.start(federation.site(name, executors.get(name, learning(federation)))) for name in SITES]
    for each in (*sites, server):
        each.result(60)
    [(params, _)] = saved
    lines = [json.loads(line) for line in (federation.folder / "server" / "events.jsonl").read_text().splitlines()]
    return {name: value.copy() for name, value in params.items()}, lines


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize("quantization", [None, {"to_server": "int8"}])
def test_files_and_lockstep_give_the_bits_of_memory(federations: Callable[[], Any], quantization: Any) -> None:
    expected, _ = run(federations(), quantization=quantization)
    for aggregation in ("file", "lockstep"):
        other = federations()
        found, _ = run(other, aggregation=aggregation, quantization=quantization)
        assert same(found, expected)
        # nothing of an update stays, and no model but the best and the last; in lockstep the sites had the last one
        assert not any((other.folder / "server" / "spool").glob("*"))
        models = other.folder / "server" / "models" / "classify" / "3-seed-0"
        kept = ["round-00002.safetensors"] + ["round-00003.safetensors"] * (aggregation == "file")
        assert sorted(each.name for each in models.iterdir()) == kept
        assert not any(path.is_file() for name in SITES for path in (other.folder / name / "held").rglob("*"))


def test_what_leaves_is_accounted_for_alike(federations: Callable[[], Any]) -> None:
    records = []
    for aggregation in ("memory", "file"):
        federation = federations()
        run(federation, aggregation=aggregation)
        records.append([read_party(federation.folder / name / "party.json").sent["model"] for name in SITES])
    assert records[0] == records[1]


BAD: dict[str, tuple[Callable[[FLModel], FLModel], str]] = {
    "nan": (lambda p: {**p, "layers.1.bias": p["layers.1.bias"] * F(np.nan)}, "not finite"),
    "shape": (lambda p: {**p, "layers.1.bias": p["layers.1.bias"][:1]}, "expected float32 [2]"),
    "missing": (lambda p: {k: v for k, v in p.items() if "bias" not in k}, "missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_bad_update_is_refused_and_the_others_go_on(federations: Callable[[], Any], kind: str) -> None:
    change, reason = BAD[kind]
    params = []
    for aggregation in ("memory", "file", "lockstep"):
        federation = federations()
        executors = learning(federation)
        honest = executors["train"].answer

        def spoil(model: FLModel, context: Any, honest: Any = honest) -> FLModel:
            result = honest(model, context)
            return msgspec.structs.replace(result, params=change(result.params))

        executors["train"].answer = spoil
        found, events = run(federation, {"site-3": executors}, aggregation=aggregation, rounds=1, min_sites=2)
        refused = [each for each in events if each["event"] == "result refused"]
        assert {each["site"] for each in refused} == {"site-3"}
        assert reason in refused[0]["reason"]
        params.append(found)
    assert same(params[0], params[1])
    assert same(params[0], params[2])


def test_site_that_abstains_sends_no_file(federations: Callable[[], Any]) -> None:
    federation = federations()
    executors = learning(federation)
    executors["train"].answer = lambda model, _: FLModel(metrics={"validation_accuracy": 0.5}, meta={WEIGHT: 0})
    _, events = run(federation, {"site-3": executors}, aggregation="file")
    assert not [each for each in events if each["event"] == "result refused"]


@pytest.mark.parametrize("aggregation", ["file", "lockstep"])
def test_filters_that_need_the_model_at_the_server_are_refused(
    federations: Callable[[], Any], aggregation: str
) -> None:
    federation = federations()
    server = federation.start(federation.server(jobs(federation, aggregation), outgoing=Chain([ClipNorm(1.0)])))
    sites = [federation.start(federation.site(name)) for name in SITES]
    with pytest.raises(SettingsError, match="holds no model that the server could quantize or filter"):
        server.result(60)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(60)


def test_site_that_did_not_hear_of_a_model_gets_it_from_another(
    federations: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lockstep the server has none to give."""
    expected, _ = run(federations(), rounds=3)
    told: list[tuple[str, str, int]] = []
    send = Outbox.exchange

    def deaf(outbox: Any, site: str, topic: str, body: bytes, *rest: Any) -> None:
        told.append((topic, site, messages.unpack(messages.Exchange, body).round))
        if told.count((messages.COMMIT, "site-2", 2)) == 1 and told[-1] == (messages.COMMIT, "site-2", 2):
            raise PeerUnreachable("not heard")
        send(outbox, site, topic, body, *rest)

    monkeypatch.setattr(Outbox, "exchange", deaf)
    found, _ = run(federations(), aggregation="lockstep", rounds=3)
    assert same(found, expected)
    assert [each for each in told if each[0] == messages.MEAN and each[2] == 2].count((messages.MEAN, "site-2", 2)) == 2


def test_server_that_is_started_again_goes_on_in_lockstep(federations: Callable[[], Any]) -> None:
    expected, _ = run(federations(), rounds=4)
    federation = federations()
    executors = {name: learning(federation) for name in SITES}
    honest = executors["site-1"]["train"].answer
    stop = [True]

    def fail(model: FLModel, context: Any) -> FLModel:
        if model.current_round == 2 and stop:
            stop.clear()
            raise FederationError("stopped by the test")
        return honest(model, context)

    executors["site-1"]["train"].answer = fail
    server = federation.start(federation.server(jobs(federation, "lockstep", rounds=4)))
    sites = [federation.start(federation.site(name, executors[name])) for name in SITES]
    for each in (server, *sites):
        with pytest.raises(FederationError):
            each.result(60)
    found, events = run(federation, executors, aggregation="lockstep", rounds=4)
    assert same(found, expected)
    # rounds 0 and 1 were not done again
    assert [each["round"] for each in events if each["event"] == "round"] == [0, 1, 2, 3, 4]
