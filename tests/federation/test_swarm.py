"""Swarm learning over endpoints in one process: the same mean, and a server that reads nothing and forges nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from fedbio.errors import FedbioError, FederationError, ProtocolError, SettingsError
from fedbio.federation import Chain, ClipNorm, Executor, FLModel, Server, Site, SiteContext, Task
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.introductions import Introduction, Statement, introduce
from fedbio.federation.model import WEIGHT, Parameters, ParamsType, Result
from fedbio.federation.sealed import Pair
from fedbio.federation.swarm_executors import with_swarm
from fedbio.federation.swarm_site import SwarmSite, _check
from fedbio.federation.workflows.script import DEPLOY, END, EVALUATE, EXAMPLES, INIT, TRAIN
from fedbio.federation.workflows.swarm import Swarm
from fedbio.federation.workflows.swarm_checks import sealed_model
from fedbio.federation.workflows.swarm_words import ADOPT, AGGREGATE, BEGIN, FINISH, MEET, SHARE
from fedbio.federation.workflows.swarm_words import TRAIN as TRAIN_SEALED
from fedbio.settings import JobsFile
from fedbio.tensors import open_file, weighted_mean
from fedbio.transport.drivers.memory import _MemoryConnection

SITES = ("site-1", "site-2", "site-3")
SHAPE = (64, 40)


def examples_of(site: str) -> int:
    return 10 * int(site[-1])


def pattern(site: str) -> bytes:
    """64 bytes that occur in everything that a site trains, and nowhere else."""
    return np.random.default_rng(int(site[-1])).standard_normal(16).astype("<f4").tobytes()


class _Script(Executor):
    kind: ClassVar[str] = "code"
    leaves: ClassVar[str] = "model"

    def __init__(self, name: str, do: Callable[[FLModel, SiteContext], FLModel]) -> None:
        self.name, self.do = name, do  # type: ignore[misc]

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        return self.do(model, context)


class Scripts:
    """What the scripts of all sites do, and a list of what each of them trained."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, str, Parameters, float]] = []
        self.change: dict[str, Callable[[FLModel], FLModel]] = {}
        self.initialized: list[str] = []

    def begin(self, model: FLModel, context: SiteContext) -> FLModel:
        self.initialized.append(context.site)
        first = np.zeros(SHAPE, np.float32)
        first[0, :16] = np.frombuffer(pattern("site-9"), np.float32)
        return FLModel(params={"w": first, "steps": np.array([4, 5], np.int64)})

    def train(self, model: FLModel, context: SiteContext) -> FLModel:
        random = np.random.default_rng([int(context.site[-1]), model.current_round])
        params = {name: np.array(value) for name, value in model.params.items()}
        params["w"] += random.standard_normal(SHAPE).astype(np.float32)
        params["w"][1, :16] = np.frombuffer(pattern(context.site), np.float32)
        params["steps"] += int(context.site[-1])
        weight = examples_of(context.site)
        self.trained.append((model.current_round, context.site, params, weight))
        made = FLModel(params=params, metrics=self.measured(model), meta={WEIGHT: weight})
        return self.change.get(context.site, lambda found: found)(made)

    def measured(self, model: FLModel) -> dict[str, float]:
        # the best model is that of round 1
        return {"accuracy": 0.9 - 0.1 * abs(model.current_round - 1), "secret_loss": 0.123}

    def executors(self) -> dict[str, Executor]:
        found = [
            _Script(DEPLOY, lambda _, context: FLModel(meta={EXAMPLES: examples_of(context.site)})),
            _Script(INIT, self.begin),
            _Script(TRAIN, self.train),
            _Script(EVALUATE, lambda model, _: FLModel(metrics=self.measured(model))),
            _Script(END, lambda *_: FLModel()),
        ]
        return with_swarm({each.name: each for each in found})

    def expected(self, rounds: int, sites: tuple[str, ...] = SITES) -> Parameters:
        """Return the plain mean of what the sites trained in the last round."""
        last = {site: (params, weight) for number, site, params, weight in self.trained if number == rounds - 1}
        mean = weighted_mean([(site, *last[site]) for site in sites])
        return {"w": mean["w"], "steps": np.rint(mean["steps"]).astype(np.int64)}


def jobs(rounds: int = 2, **limits: Any) -> JobsFile:
    job = {
        "workflow": "swarm",
        "rounds": rounds,
        "client": {"script": "train.py", "initial": "train.py:make"},
        "selection": {"metric": "accuracy"},
    }
    federation = {"join_deadline_s": 20, "round_deadline_s": 20, "heartbeat_s": 0.5, **limits}
    return JobsFile.model_validate({"jobs": [job], "federation": federation})


def server_of(federation: Any, what: JobsFile | None = None) -> Server:
    code = federation.folder / "code"
    code.mkdir(exist_ok=True)
    (code / "train.py").write_text("def make(): ...\n")
    server: Server = federation.server(what or jobs(), code=code)
    return server


def sites_of(federation: Any, scripts: Scripts, **options: Any) -> list[Site]:
    return [
        federation.site(name, scripts.executors(), allow=("code", "train", "evaluate"), **options) for name in SITES
    ]


def run(federation: Any, scripts: Scripts, what: JobsFile | None = None) -> None:
    running = [federation.start(each) for each in (server_of(federation, what), *sites_of(federation, scripts))]
    finish(running)


def finish(running: list[Future[None]]) -> None:
    errors = []
    for each in running:
        try:
            each.result(60)
        except FedbioError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def kept(federation: Any, site: str, title: str) -> Path:
    found: Path = federation.folder / site / "swarm" / "swarm" / f"{title}.safetensors"
    return found


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [each for each in lines if each["event"] == name]


def drawn(federation: Any) -> list[str]:
    return [each["site"] for each in events(federation.folder / "server", "aggregator drawn")]


@pytest.fixture
def scripts() -> Scripts:
    return Scripts()


# what it computes


def test_last_model_is_the_plain_mean_and_the_same_file_at_all_sites(federation: Any, scripts: Scripts) -> None:
    run(federation, scripts, jobs(rounds=3))
    digests = {hashlib.sha256(kept(federation, site, "last").read_bytes()).hexdigest() for site in SITES}
    assert len(digests) == 1
    found = open_file(kept(federation, "site-1", "last"))
    for name, value in scripts.expected(3).items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    # each site trained each round once, and only one began
    assert sorted((number, site) for number, site, *_ in scripts.trained) == [(r, s) for r in range(3) for s in SITES]
    assert len(scripts.initialized) == 1


def test_best_model_by_the_metric_is_kept_beside_the_last(federation: Any, scripts: Scripts) -> None:
    run(federation, scripts, jobs(rounds=3))
    cards = [json.loads(kept(federation, site, "best").with_name("model.json").read_text()) for site in SITES]
    assert [(card["best"]["round"], card["last"]["round"]) for card in cards] == [(1, 3)] * 3
    assert len({card["best"]["sha256"] for card in cards}) == 1
    found = open_file(kept(federation, "site-2", "best"))
    first = {site: (params, weight) for number, site, params, weight in scripts.trained if number == 0}
    mean = weighted_mean([(site, *first[site]) for site in SITES])
    np.testing.assert_array_equal(found["w"], mean["w"])


def test_sites_take_turns_by_the_seed(federation: Any, scripts: Scripts) -> None:
    run(federation, scripts, jobs(rounds=4))
    turns = drawn(federation)
    assert len(turns) == 4
    assert len(set(turns)) > 1
    adopted = events(federation.folder / "site-1", "model adopted")
    assert [each["made_by"] for each in adopted if each["round"]] == turns


def test_differences_become_whole_models_at_the_site(federation: Any, scripts: Scripts) -> None:
    def as_difference(site: str) -> Callable[[FLModel], FLModel]:
        def change(found: FLModel) -> FLModel:
            before = open_file(next((federation.folder / site / "swarm/swarm").glob("run-*/round-*")))
            less = {name: value - before[name] for name, value in found.params.items()}
            return msgspec.structs.replace(found, params=less, params_type=ParamsType.DIFF)

        return change

    scripts.change = {site: as_difference(site) for site in SITES}
    run(federation, scripts, jobs(rounds=1))
    found = open_file(kept(federation, "site-1", "last"))
    np.testing.assert_allclose(found["w"], scripts.expected(1)["w"], rtol=1e-5, atol=1e-6)


def test_sites_filters_come_before_the_seal(federation: Any, scripts: Scripts) -> None:
    """What nobody can filter afterwards is filtered first: three sites send a model of norm at most 1."""
    sites = sites_of(federation, scripts, outgoing=Chain([ClipNorm(1.0, tasks=(TRAIN,))]))
    scripts.change = {site: lambda found: _with(found, steps=np.zeros(2, np.int64)) for site in SITES}
    finish([federation.start(each) for each in (server_of(federation, jobs(rounds=1)), *sites)])
    assert np.linalg.norm(open_file(kept(federation, "site-3", "last"))["w"]) <= 1.0


def _with(model: FLModel, **params: Any) -> FLModel:
    return msgspec.structs.replace(model, params={**model.params, **params})


def test_job_without_a_first_model_is_refused(federation: Any, scripts: Scripts) -> None:
    what = jobs()
    client = what.jobs[0].client.model_copy(update={"initial": None})  # type: ignore[union-attr]
    what = what.model_copy(update={"jobs": [what.jobs[0].model_copy(update={"client": client})]})
    with pytest.raises(SettingsError, match=r"client\.initial is missing"):
        run(federation, scripts, what)


# who sees what


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every frame that any site sends to the server or the server to a site."""
    frames: list[bytes] = []
    write = _MemoryConnection.write

    def record(self: _MemoryConnection, frame: Any, *options: Any) -> None:
        frames.append(bytes(frame.payload))
        write(self, frame, *options)

    monkeypatch.setattr(_MemoryConnection, "write", record)
    return frames


def leaks(wire: list[bytes], scripts: Scripts, rounds: int) -> set[str]:
    """Return what of the sites' own could be read in the frames."""
    everything = b"".join(wire)
    searched = {site: pattern(site) for site in (*SITES, "site-9")}
    # of means, and of each update, a run of values from the middle
    searched["mean"] = scripts.expected(rounds)["w"][30, :16].tobytes()
    for number, site, params, _ in scripts.trained:
        searched[f"{site} in round {number}"] = params["w"][20, 8:24].tobytes()
    searched["a metric that nobody selects by"] = b"secret_loss"
    return {name for name, value in searched.items() if value in everything}


def test_server_neither_receives_nor_sends_a_byte_of_a_model(
    federation: Any, scripts: Scripts, wire: list[bytes]
) -> None:
    run(federation, scripts)
    assert leaks(wire, scripts, 2) == set()
    # what was recorded is all of it: four updates and three models were on the way, to the server and from it
    assert sum(map(len, wire)) > 2 * 7 * 4 * SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("what", ["update", "metric"])
def test_planted_leak_is_found(
    federation: Any, scripts: Scripts, wire: list[bytes], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    train = SwarmSite.train

    def leaky(self: SwarmSite, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        made = train(self, task, model, context)
        if context.site != "site-2":
            return made
        if what == "metric":
            return msgspec.structs.replace(made, metrics={"secret_loss": 0.1})
        found = next(params for _, site, params, _ in scripts.trained if site == "site-2")
        return _with(made, leak=found["w"])

    monkeypatch.setattr(SwarmSite, "train", leaky)
    run(federation, scripts)
    expected = {"site-2", "site-2 in round 0"} if what == "update" else {"a metric that nobody selects by"}
    assert leaks(wire, scripts, 2) == expected


def test_server_keeps_no_model_on_its_disk(federation: Any, scripts: Scripts) -> None:
    run(federation, scripts)
    files = [path.read_bytes() for path in (federation.folder / "server").rglob("*") if path.is_file()]
    assert leaks(files, scripts, 2) == set()


def test_sites_account_for_what_they_sealed(federation: Any, scripts: Scripts) -> None:
    run(federation, scripts)
    for site in SITES:
        sent = json.loads((federation.folder / site / "party.json").read_text())["sent"]
        assert "model" not in sent
        assert sent["sealed"]["bytes"] > 4 * SHAPE[0] * SHAPE[1]


def test_sites_note_whose_certificate_they_sealed_for(federation: Any, scripts: Scripts) -> None:
    run(federation, scripts)
    turns = drawn(federation)
    for site in SITES:
        sealed = events(federation.folder / site, "update sealed")
        assert [each["receiver"] for each in sealed] == [turn for turn in turns if turn != site]
        for each in sealed:
            pem = (federation.folder / "kits" / each["receiver"] / "certificate.pem").read_text()
            assert each["certificate"] == hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


@pytest.mark.parametrize("task", [INIT, TRAIN, EVALUATE])
def test_server_that_asks_a_script_itself_is_refused(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None], task: str
) -> None:
    def change(controller: Swarm, name: str, model: FLModel, sites: list[str]) -> FLModel:
        if name == TRAIN_SEALED:
            with pytest.raises(FederationError, match=f"was begun as a swarm at site-1: {task} of the server"):
                controller.broadcast_and_wait(task, FLModel(), ["site-1"], min_responses=1)
        return model

    hostile(change)
    run(federation, scripts, jobs(rounds=1))


# a server that means ill

Change = Callable[[Swarm, str, FLModel, list[str]], FLModel]


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Have the server change what it passes on."""

    def become(change: Change) -> None:
        ask = Swarm.broadcast_and_wait

        def changed(self: Swarm, task: str, model: FLModel, sites: Any, **options: Any) -> Any:
            if not task.startswith("swarm/"):
                return ask(self, task, model, sites, **options)
            return ask(self, task, change(self, task, model, list(sites)), sites, **options)

        monkeypatch.setattr(Swarm, "broadcast_and_wait", changed)

    return become


def _swap(model: FLModel) -> FLModel:
    one, two = sorted(model.params)
    return msgspec.structs.replace(model, params={one: model.params[two], two: model.params[one]})


def _flip(model: FLModel) -> FLModel:
    params = {name: np.array(value) for name, value in model.params.items()}
    for value in params.values():
        value[len(value) // 2] ^= 1
    return msgspec.structs.replace(model, params=params)


def _cut(model: FLModel) -> FLModel:
    return msgspec.structs.replace(model, params={name: value[:-40] for name, value in model.params.items()})


@pytest.mark.parametrize("change", [_swap, _flip, _cut])
def test_sealed_updates_that_the_server_tampers_with_are_refused_and_their_sites_named(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None], change: Callable[[FLModel], FLModel]
) -> None:
    once: list[str] = []

    def tamper(_: Swarm, task: str, model: FLModel, sites: list[str]) -> FLModel:
        if task != AGGREGATE or once:
            return model
        once.extend(sites)
        return change(model)

    hostile(tamper)
    run(federation, scripts)
    refused = events(federation.folder / once[0], "update refused")
    assert [each["site"] for each in refused] == [site for site in SITES if site != once[0]]
    [failed] = events(federation.folder / "server", "exchange failed")
    assert all(site in failed["reason"] for site in SITES)
    # another exchange, with fresh keys, has done it, and no site has trained twice
    np.testing.assert_array_equal(open_file(kept(federation, "site-1", "last"))["w"], scripts.expected(2)["w"])
    assert len(scripts.trained) == 6
    assert [each["round"] for each in events(federation.folder / "server", "round")] == [0, 1, 2]


def test_server_that_never_stops_tampering_ends_the_job_with_the_reason(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None]
) -> None:
    hostile(lambda _, task, model, __: _swap(model) if task == AGGREGATE else model)
    with pytest.raises(FederationError, match=r"no site could aggregate round 0.*chunk 0 does not open"):
        run(federation, scripts)


def test_updates_of_a_former_round_are_refused(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None]
) -> None:
    former: dict[str, Any] = {}
    replayed: list[str] = []

    def replay(_: Swarm, task: str, model: FLModel, sites: list[str]) -> FLModel:
        if task != AGGREGATE:
            return model
        again = {name: former[name] for name in model.params if name in former}
        if model.current_round == 1 and again and not replayed:
            replayed.extend(name.removeprefix("update/") for name in again)
            return msgspec.structs.replace(model, params={**model.params, **again})
        former.update({name: np.array(value) for name, value in model.params.items()})
        return model

    hostile(replay)
    run(federation, scripts)
    aggregator = drawn(federation)[1]
    assert replayed
    assert [each["site"] for each in events(federation.folder / aggregator, "update refused")] == sorted(replayed)


def test_model_of_a_former_round_is_not_adopted(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None]
) -> None:
    former: list[FLModel] = []

    def replay(_: Swarm, task: str, model: FLModel, sites: list[str]) -> FLModel:
        if task != ADOPT or not model.params:
            return model
        if model.current_round == 1:
            former.append(model)
        return msgspec.structs.replace(model, params=former[0].params) if model.current_round == 2 else model

    hostile(replay)
    with pytest.raises(FederationError, match="cannot be given the model of round 2"):
        run(federation, scripts)


def _with_introductions(model: FLModel, change: Callable[[dict[str, Any]], dict[str, Any]]) -> FLModel:
    return msgspec.structs.replace(model, meta={**model.meta, "introductions": change(model.meta["introductions"])})


def _forged(federation: Any, controller: Swarm, site: str, exchange: int) -> bytes:
    """Return an introduction of `site` with a key of the server's, signed with what the server has: its own key."""
    text = Statement(
        federation="test", job="swarm", run=controller.course.run, exchange=exchange, site=site, examples=30,
        key=Pair.make().public,
    )  # fmt: skip
    return introduce(text, SiteIdentity(federation.credentials("server")))


@pytest.mark.parametrize("whose", ["certificate", "signature"])
def test_servers_own_key_in_place_of_the_aggregators_is_refused(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None], whose: str
) -> None:
    def put_in(controller: Swarm, task: str, model: FLModel, sites: list[str]) -> FLModel:
        if task != TRAIN_SEALED or model.current_round != 1:
            return model
        [(site, honest)] = model.meta["introductions"].items()
        forged = msgspec.msgpack.decode(
            _forged(federation, controller, site, model.meta["exchange"]), type=Introduction
        )
        if whose == "signature":
            known = msgspec.msgpack.decode(base64.b64decode(honest), type=Introduction)
            forged = msgspec.structs.replace(forged, certificate=known.certificate)
        return _with_introductions(model, lambda _: {site: base64.b64encode(msgspec.msgpack.encode(forged)).decode()})

    hostile(put_in)
    reason = "its certificate is that of 'server'" if whose == "certificate" else "the signature is not of its"
    with pytest.raises(FederationError, match=f"the introduction of site-. is refused: {reason}"):
        run(federation, scripts)
    # nothing was sealed for the server: the round has no update that left
    refusals = [each for site in SITES for each in events(federation.folder / site, "exchange refused")]
    assert len(refusals) == 6
    assert all(each["reason"].startswith("the introduction of site-") for each in refusals)


def test_one_sites_introduction_under_anothers_name_is_refused(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None]
) -> None:
    def exchange(_: Swarm, task: str, model: FLModel, sites: list[str]) -> FLModel:
        if task != AGGREGATE:
            return model
        one, two = sorted(model.meta["introductions"])
        return _with_introductions(model, lambda found: {one: found[two], two: found[one]})

    hostile(exchange)
    with pytest.raises(FederationError, match=r"introduction of site-\d is refused: its certificate is that of"):
        run(federation, scripts)


# sites that fail


def test_update_that_claims_too_much_costs_its_site_the_round(federation: Any, scripts: Scripts) -> None:
    scripts.change["site-3"] = lambda found: msgspec.structs.replace(found, meta={WEIGHT: 31})
    run(federation, scripts, jobs(rounds=1, min_sites=2))
    refused = events(federation.folder / "server", "update refused")
    assert [each["site"] for each in refused] == ["site-3"]
    assert "weight 31 is not between 0 and the 30 examples" in refused[0]["reason"]
    for site in SITES:
        found = open_file(kept(federation, site, "last"))
        np.testing.assert_array_equal(found["w"], scripts.expected(1, ("site-1", "site-2"))["w"])


BASE = {"w": np.zeros((2, 2), np.float32)}
BAD: dict[str, tuple[Parameters, float, str]] = {
    "nan": ({"w": np.full((2, 2), np.nan, np.float32)}, 1, "not finite"),
    "shape": ({"w": np.zeros(2, np.float32)}, 1, "expected float32"),
    "dtype": ({"w": np.zeros((2, 2), np.float64)}, 1, "expected float32"),
    "missing": ({}, 1, "missing"),
    "extra": ({**BASE, "more": np.zeros(1)}, 1, "unexpected"),
    "huge weight": (BASE, 11, "between 0 and the 10"),
    "negative weight": (BASE, -1, "between 0 and the 10"),
    "nan weight": (BASE, float("nan"), "between 0 and the 10"),
}


@pytest.mark.parametrize("kind", BAD)
def test_aggregating_site_refuses_what_the_server_cannot_look_at(kind: str) -> None:
    params, weight, reason = BAD[kind]
    _check(BASE, 10, 10, BASE)
    with pytest.raises(ProtocolError, match=reason):
        _check(params, weight, 10, BASE)


def test_site_that_abstains_counts_nothing(federation: Any, scripts: Scripts) -> None:
    scripts.change["site-1"] = lambda found: FLModel(meta={WEIGHT: 0})
    run(federation, scripts, jobs(rounds=1))
    found = open_file(kept(federation, "site-1", "last"))
    np.testing.assert_array_equal(found["w"], scripts.expected(1, ("site-2", "site-3"))["w"])


def test_mean_of_one_update_is_never_made(federation: Any, scripts: Scripts) -> None:
    for site in SITES[:2]:
        scripts.change[site] = lambda found: FLModel(meta={WEIGHT: 0})
    with pytest.raises(FederationError, match="1 of them do not abstain, 2 are needed"):
        run(federation, scripts, jobs(rounds=1, min_sites=1))


@pytest.mark.slow
def test_aggregator_that_vanishes_is_replaced_and_catches_up_when_it_is_back(federation: Any, scripts: Scripts) -> None:
    started, back = threading.Event(), threading.Event()
    vanished: list[str] = []
    train = scripts.train

    def wait_for_it(model: FLModel, context: SiteContext) -> FLModel:
        if model.current_round == 1 and context.site not in vanished:
            started.set()
            back.wait(30)
        return train(model, context)

    scripts.train = wait_for_it  # type: ignore[method-assign]
    executors = {site: scripts.executors() for site in SITES}

    def vanish(site: str) -> Callable[[FLModel, SiteContext], FLModel]:
        aggregate = executors[site][AGGREGATE]

        def do(model: FLModel, context: SiteContext) -> FLModel:
            if not vanished:
                vanished.append(site)
                raise KeyboardInterrupt
            return aggregate.execute(Task(name=AGGREGATE, model=model, job="swarm"), model, context)

        return do

    what = jobs(rounds=3, min_sites=2, round_deadline_s=3)
    server = federation.start(server_of(federation, what))
    sites = {}
    for site in SITES:
        parts = {**executors[site], AGGREGATE: _Script(AGGREGATE, vanish(site))}
        sites[site] = federation.start(federation.site(site, parts, allow=("code", "train", "evaluate")))
    assert started.wait(30)
    [gone] = vanished
    with pytest.raises(KeyboardInterrupt):
        sites[gone].result(5)
    sites[gone] = federation.start(federation.site(gone, scripts.executors(), allow=("code", "train", "evaluate")))
    back.set()
    finish([server, *sites.values()])
    assert drawn(federation)[0] == gone
    assert drawn(federation)[1] != gone
    digests = {hashlib.sha256(kept(federation, site, "last").read_bytes()).hexdigest() for site in SITES}
    assert len(digests) == 1


def test_site_that_was_restarted_between_two_tasks_meets_again_and_trains_no_round_twice(
    federation: Any, scripts: Scripts, hostile: Callable[[Change], None]
) -> None:
    """Its keys were in memory only: the exchange under way is lost, its update is not."""
    forgotten: list[str] = []
    found = {site: scripts.executors() for site in SITES}
    fresh = {site: scripts.executors() for site in SITES}

    def forget(_: Swarm, task: str, model: FLModel, sites: list[str]) -> FLModel:
        if task == AGGREGATE and not forgotten:
            forgotten.extend(sites)
            found[sites[0]].update(fresh[sites[0]])
        return model

    hostile(forget)
    running = [
        federation.start(federation.site(site, found[site], allow=("code", "train", "evaluate"))) for site in SITES
    ]
    finish([federation.start(server_of(federation)), *running])
    [failed] = events(federation.folder / "server", "exchange failed")
    assert "has no keys of exchange" in failed["reason"]
    assert len(scripts.trained) == 6
    np.testing.assert_array_equal(open_file(kept(federation, "site-1", "last"))["w"], scripts.expected(2)["w"])


# a server that is stopped


class _Stopped(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("task", "count"),
    [(MEET, 2), (BEGIN, 1), (SHARE, 1), (TRAIN_SEALED, 2), (AGGREGATE, 2), (ADOPT, 4), (ADOPT, 5), (FINISH, 1)],
)
def test_server_that_was_stopped_goes_on_to_the_same_model(
    federation: Any, scripts: Scripts, monkeypatch: pytest.MonkeyPatch, task: str, count: int, before: bool
) -> None:
    ask, seen = Swarm.broadcast_and_wait, []

    def stopping(self: Swarm, name: str, *arguments: Any, **options: Any) -> Any:
        seen.extend([name] * (name == task))
        stops = name == task and len(seen) == count
        if stops and before:
            raise _Stopped
        found = ask(self, name, *arguments, **options)
        if stops:
            raise _Stopped
        return found

    monkeypatch.setattr(Swarm, "broadcast_and_wait", stopping)
    server = federation.start(server_of(federation))
    sites = [federation.start(each) for each in sites_of(federation, scripts)]
    with pytest.raises(_Stopped):
        server.result(30)
    finish([federation.start(server_of(federation)), *sites])
    digests = {hashlib.sha256(kept(federation, site, "last").read_bytes()).hexdigest() for site in SITES}
    assert len(digests) == 1
    np.testing.assert_array_equal(open_file(kept(federation, "site-2", "last"))["w"], scripts.expected(2)["w"])
    assert sorted((number, site) for number, site, *_ in scripts.trained) == [(r, s) for r in range(2) for s in SITES]
    # a model that a site has adopted counts; one that nobody has is made again
    lost = (task, count) in [(TRAIN_SEALED, 2), (AGGREGATE, 2)] or (task, count, before) == (ADOPT, 4, True)
    assert len(drawn(federation)) == 2 + lost


# what the server can check

SOUND = {"model": np.zeros(100, np.uint8), "key/site-2": np.zeros(128, np.uint8)}
UNSOUND: dict[str, Parameters] = {
    "no model": {"key/site-2": SOUND["key/site-2"]},
    "empty": {**SOUND, "model": np.zeros(0, np.uint8)},
    "too long": {**SOUND, "model": np.zeros(101, np.uint8)},
    "numbers": {**SOUND, "model": np.zeros(25, np.float32)},
    "two dimensions": {**SOUND, "model": np.zeros((10, 10), np.uint8)},
    "a long key": {**SOUND, "key/site-2": np.zeros(1025, np.uint8)},
    "a key for somebody else": {**SOUND, "key/site-3": np.zeros(128, np.uint8)},
    "something else": {**SOUND, "site-2": np.zeros(128, np.uint8)},
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_server_passes_on_sealed_bytes_of_the_right_size_for_the_right_site_only(kind: str) -> None:
    found = sealed_model(Result(task="", model=FLModel(params=SOUND)), ["site-2"], 100)
    assert found.keys() == SOUND.keys()
    with pytest.raises(ProtocolError, match=r"sent|sealed something"):
        sealed_model(Result(task="", model=FLModel(params=UNSOUND[kind]), site="site-1"), ["site-2"], 100)
