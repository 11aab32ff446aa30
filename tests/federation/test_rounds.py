"""Whole jobs over endpoints in one process: what counts, what is refused, who is named, what is done again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbio.errors import FederationError, MachineError, RefusedError
from fedbio.federation import FLModel, ParamsType, Task
from fedbio.federation.executor import Executor
from fedbio.federation.model import WEIGHT
from fedbio.federation.policy import Policy
from fedbio.federation.site_tasks import Tasks
from fedbio.federation.state import Progress, State
from fedbio.results import read_party

SITES = ("site-1", "site-2", "site-3")


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [each for each in lines if each["event"] == name]


def spoiled(federation: Any, change: Callable[[FLModel], FLModel]) -> Any:
    """Executors of a site whose training result is changed before it leaves."""
    executors = federation.fakes()
    honest = executors["train"].answer
    executors["train"].answer = lambda model, context: change(honest(model, context))
    return executors


def test_mean_is_weighted_by_proteins_and_best_round_is_chosen_on_validation(federation: Any) -> None:
    saved = []
    server = federation.start(federation.server(federation.jobs(), save_model=lambda *found: saved.append(found)))
    sites = [federation.start(federation.site(name)) for name in SITES]
    for each in (*sites, server):
        each.result(30)
    [(params, publication)] = saved
    assert publication.best_round == 2
    # each round adds (1*10 + 2*20 + 3*30) / 60 = 7/3
    np.testing.assert_array_equal(params["layers.0.weight"], np.full((3, 4), np.float32(np.float32(7 / 3) + 7 / 3)))
    record = read_party(federation.folder / "server" / "party.json")
    assert record.rounds == {"3": {"0": 2}}
    assert record.federation["site-2"].train == {"Nucleus": 20}


def test_site_accounts_for_every_byte_by_kind(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs()))
    sites = [federation.start(federation.site(name)) for name in SITES]
    for each in (*sites, server):
        each.result(30)
    record = read_party(federation.folder / "site-1" / "party.json")
    assert set(record.sent) == {"control", "counts", "metrics", "model", "sums"}
    # initialize and three rounds
    assert record.sent["model"].messages == 4
    written = events(federation.folder / "site-1", "sent")
    for kind, traffic in record.sent.items():
        assert traffic.bytes == sum(each["bytes"] for each in written if each["kind"] == kind)


def _with(model: FLModel, **meta: Any) -> FLModel:
    return msgspec.structs.replace(model, meta={**model.meta, **meta})


def _with_params(model: FLModel, change: Callable[[dict[str, Any]], dict[str, Any]]) -> FLModel:
    return msgspec.structs.replace(model, params=change(model.params))


BAD: dict[str, tuple[Callable[[FLModel], FLModel], str]] = {
    "nan": (
        lambda m: _with_params(m, lambda p: {**p, "layers.1.bias": p["layers.1.bias"] * np.float32(np.nan)}),
        "not finite",
    ),
    "infinite": (lambda m: _with_params(m, lambda p: {k: v + np.float32(np.inf) for k, v in p.items()}), "not finite"),
    "shape": (
        lambda m: _with_params(m, lambda p: {**p, "layers.1.bias": p["layers.1.bias"][:1]}),
        "expected float32 [2]",
    ),
    "dtype": (lambda m: _with_params(m, lambda p: {k: v.astype(np.float64) for k, v in p.items()}), "expected float32"),
    "missing": (lambda m: _with_params(m, lambda p: {k: v for k, v in p.items() if "bias" not in k}), "missing"),
    "extra": (lambda m: _with_params(m, lambda p: {**p, "more": p["layers.1.bias"]}), "unexpected"),
    "difference": (
        lambda m: msgspec.structs.replace(m, params_type=ParamsType.DIFF),
        "expected parameters of type FULL",
    ),
    "huge weight": (lambda m: _with(m, **{WEIGHT: 10**12}), "above the 30 examples"),
    "negative weight": (lambda m: _with(m, **{WEIGHT: -3}), "not a positive number"),
    "nan weight": (lambda m: _with(m, **{WEIGHT: float("nan")}), "not a positive number"),
    "text as weight": (lambda m: _with(m, **{WEIGHT: "many"}), "not a positive number"),
    "nan metric": (lambda m: msgspec.structs.replace(m, metrics={"validation_accuracy": float("nan")}), "metric"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_update_is_refused_and_named_and_the_others_go_on(federation: Any, kind: str) -> None:
    change, reason = BAD[kind]
    saved = []
    server = federation.start(
        federation.server(federation.jobs(rounds=2, min_sites=2), save_model=lambda *found: saved.append(found))
    )
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    sites.append(federation.start(federation.site("site-3", spoiled(federation, change))))
    for each in (*sites, server):
        each.result(30)
    refused = events(federation.folder / "server", "result refused")
    assert [each["site"] for each in refused] == ["site-3", "site-3"]
    assert reason in refused[0]["reason"]
    [(params, _)] = saved
    # without site-3: (1*10 + 2*20) / 30 = 5/3 a round
    np.testing.assert_allclose(params["layers.0.weight"], 10 / 3, rtol=1e-6)


def test_job_ends_with_the_reason_when_all_sites_are_needed(federation: Any) -> None:
    change, _ = BAD["nan"]
    server = federation.start(federation.server(federation.jobs()))
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    sites.append(federation.start(federation.site("site-3", spoiled(federation, change))))
    with pytest.raises(
        FederationError, match=r"of 3 sites have answered, 3 are needed; site-3: its result was refused.*not finite"
    ):
        server.result(30)
    for each in sites:
        with pytest.raises(FederationError, match=r"the server has given up.*site-3"):
            each.result(30)


def test_refused_task_is_an_event_and_a_reply(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs()))
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    sites.append(federation.start(federation.site("site-3", allow=("statistics", "publish"))))
    with pytest.raises(FederationError, match=r"site-3: refused: the policy of site-3 does not allow 'train'"):
        server.result(30)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(30)
    assert [each["task"] for each in events(federation.folder / "site-3", "task refused")] == ["train"]


def test_refused_script_is_told_how_it_is_allowed() -> None:
    class Taking(Executor):
        kind = "code"

        def execute(self, task: Task, model: FLModel, context: Any) -> FLModel:
            raise AssertionError

    task = Task(name="client/deploy", model=FLModel(meta={"files": [{"name": "train.py"}, {"name": "../net.py"}]}))
    tasks = Tasks(
        executors={}, allow=["embed", "train"], quantization=(), policy=Policy(), incoming=None, outgoing=None,
        prepare=None, party=None, held=None,
    )  # fmt: skip
    assert tasks._refusal(task, Taking(), "site-3") == (
        "the policy of site-3 does not allow 'code' (allowed: embed, train); to let it run, its operator reads "
        "train.py, and names it with --code train.py, or in site.yaml with `allow: [..., code]` and `code: [train.py]`"
    )


def test_few_proteins_abstain_with_weight_zero(federation: Any) -> None:
    executors = federation.fakes()
    executors["train"].answer = lambda model, _: FLModel(metrics={"validation_accuracy": 0.5}, meta={WEIGHT: 0})
    executors["moments"].answer = lambda *_: FLModel(meta={WEIGHT: 0})
    saved = []
    server = federation.start(
        federation.server(federation.jobs(rounds=1), save_model=lambda *found: saved.append(found))
    )
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    sites.append(federation.start(federation.site("site-3", executors)))
    for each in (*sites, server):
        each.result(30)
    [(params, publication)] = saved
    assert publication.best_round == 1
    np.testing.assert_allclose(params["layers.0.weight"], 5 / 3, rtol=1e-6)
    assert "site-3 has too few" in read_party(federation.folder / "server" / "party.json").remarks[0]


def test_missing_site_is_named_when_the_deadline_passes(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(join_deadline_s=1)))
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    with pytest.raises(FederationError, match="2 of 3 sites are here after 1 s, 3 are needed; missing: site-3"):
        server.result(30)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(30)


def test_sites_may_start_before_the_server(federation: Any) -> None:
    sites = [federation.start(federation.site(name)) for name in SITES]
    time.sleep(0.3)
    server = federation.start(federation.server(federation.jobs(rounds=1)))
    for each in (*sites, server):
        each.result(30)


def test_unknown_job_is_turned_away(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(join_deadline_s=2)))
    with pytest.raises(FederationError, match="there is no job dream here; the jobs are classify"):
        federation.start(federation.site("site-1", jobs=("dream",))).result(30)
    with pytest.raises(FederationError):
        server.result(30)


def test_site_with_a_job_leaves_when_it_is_done(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(rounds=1)))
    sites = [federation.start(federation.site(name, jobs=("classify",))) for name in SITES]
    for each in (*sites, server):
        each.result(30)


def test_second_process_on_a_workspace_is_refused(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(join_deadline_s=1)))
    time.sleep(0.3)
    with pytest.raises(MachineError, match="in use by process"):
        federation.server(federation.jobs()).run()
    with pytest.raises(FederationError):
        server.result(30)


def test_foreign_certificate_is_refused(federation: Any, tmp_path: Path) -> None:
    from fedbio.provision import provision
    from fedbio.settings import FederationFile

    other = {"federation": "other", "server": {"address": "localhost:1"}, "sites": ["site-1"]}
    provision(FederationFile.model_validate(other), tmp_path / "other")
    site = federation.site("site-1")
    site.credentials = type(site.credentials)(
        federation.folder / "kits/site-1/ca.pem",
        tmp_path / "other/site-1/certificate.pem",
        tmp_path / "other/site-1/private.key",
    )
    with pytest.raises(RefusedError, match="foreign authority"):
        site.run()


def test_restarted_server_goes_on_with_the_unfinished_run(federation: Any) -> None:
    """A server that fails in its second run does not do the first one again, and ends with the same model."""
    calls = {name: federation.fakes() for name in SITES}
    stop = threading.Event()

    def fail(model: FLModel, context: Any) -> FLModel:
        if model.current_round == 2 and stop.is_set() and context.site == "site-1":
            raise FederationError("stopped by the test")
        return honest(model, context)

    honest = calls["site-1"]["train"].answer
    calls["site-1"]["train"].answer = fail

    def evaluated(model: FLModel, context: Any) -> FLModel:
        stop.set()
        return federation.fakes()["evaluate"].answer(model, context)

    calls["site-1"]["evaluate"].answer = evaluated
    server = federation.start(federation.server(federation.jobs(seeds=(0, 1))))
    sites = [federation.start(federation.site(name, calls[name])) for name in SITES]
    for each in (server, *sites):
        with pytest.raises(FederationError):
            each.result(30)
    state = State(federation.folder / "server")
    assert state.progress("classify", "3-seed-1") == Progress(2, 1, 0.8, finished=False)
    state.close()

    calls["site-1"]["train"].answer = honest
    calls["site-1"]["evaluate"].answer = federation.fakes()["evaluate"].answer
    before = calls["site-1"]["train"].calls
    saved = []
    server = federation.start(
        federation.server(federation.jobs(seeds=(0, 1)), save_model=lambda *found: saved.append(found))
    )
    sites = [federation.start(federation.site(name, calls[name])) for name in SITES]
    for each in (server, *sites):
        each.result(30)
    # only round 2 of the second run was left
    assert calls["site-1"]["train"].calls - before == 1
    assert saved[0][1].rounds == {"3": {"0": 2, "1": 2}}


def test_job_with_other_settings_is_not_mixed_with_what_was_begun(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(rounds=1)))
    sites = [federation.start(federation.site(name)) for name in SITES]
    for each in (*sites, server):
        each.result(30)
    with pytest.raises(Exception, match=r"job 'classify' was begun in .* with other settings"):
        federation.server(federation.jobs(rounds=2)).run()


def test_serving_server_runs_jobs_that_come_later(federation: Any) -> None:
    first, both = federation.jobs(rounds=1), federation.jobs(rounds=1)
    second = both.jobs[0].model_copy(update={"name": "second"})
    both = both.model_copy(update={"jobs": [*both.jobs, second]})
    taken = threading.Event()
    returned = []

    def done() -> list[str]:
        return [each["job"] for each in events(federation.folder / "server", "job done")]

    def more() -> Any:
        if done() == ["classify", "second"]:
            raise KeyboardInterrupt
        if done() == ["classify"] and not returned:
            returned.append(both)
            return both
        if returned:
            taken.set()
        return None

    pool_server = federation.server(first)
    running = federation.pool.submit(pool_server.run, more_jobs=more)
    sites = [federation.start(federation.site(name, jobs=("classify",))) for name in SITES[:1]]
    sites += [federation.start(federation.site(name, connect_deadline_s=3)) for name in SITES[1:]]
    sites[0].result(30)
    # the first job is done and site-1 has left; it comes back for the second
    assert taken.wait(20)
    again = federation.start(federation.site("site-1", jobs=("second",)))
    again.result(30)
    with pytest.raises(KeyboardInterrupt):
        running.result(30)
    assert done() == ["classify", "second"]
