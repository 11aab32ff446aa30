"""Federated averaging of scripts, over real endpoints, against plain loops over the sites written here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FederationError
from fedbio.federation import Executor, FLModel, ParamsType, SiteContext, Task
from fedbio.federation.model import PARAMS, WEIGHT
from fedbio.federation.workflows.script import DEPLOY, END, EVALUATE, EXAMPLES, INIT, TRAIN
from fedbio.settings import JobsFile
from fedbio.tensors import open_file, write_file
from fedbio.transport import TensorPayload

SITES = ("site-1", "site-2", "site-3")
EXAMPLES_OF = {"site-1": 10, "site-2": 20, "site-3": 30}
Model = dict[str, np.ndarray[Any, Any]]


class Fake(Executor):
    """Stands in for a script."""

    leaves = "model"

    def __init__(self, name: str, answer: Callable[[FLModel, SiteContext], FLModel]) -> None:
        self.name, self.kind, self.answer = name, "train", answer  # type: ignore[misc]
        self.rounds: list[int] = []

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        self.rounds.append(model.current_round)
        return self.answer(model, context)


def initial() -> Model:
    return {"layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bn.weight": np.ones(2, np.float32)}


def trained(model: Model, site: str) -> Model:
    """Go half of the way to the site's own optimum, the same number everywhere."""
    return {name: value + (np.float32(site[-1]) - value) / 2 for name, value in model.items()}


def accuracy(model: Model) -> float:
    return float(1 / (1 + abs(model["layer.weight"].mean() - 2.2)))


def train(model: FLModel, context: SiteContext) -> FLModel:
    return FLModel(
        params=trained(model.params, context.site),
        metrics={"accuracy": accuracy(model.params)},
        meta={WEIGHT: EXAMPLES_OF[context.site]},
    )


def executors(**others: Callable[[FLModel, SiteContext], FLModel]) -> dict[str, Executor]:
    answers = {
        DEPLOY: lambda _, context: FLModel(meta={EXAMPLES: EXAMPLES_OF[context.site]}),
        INIT: lambda *_: FLModel(params=initial()),
        TRAIN: train,
        EVALUATE: lambda model, _: FLModel(metrics={"accuracy": accuracy(model.params)}),
        END: lambda *_: FLModel(),
    }
    answers |= {f"client/{name}": answer for name, answer in others.items()}
    return {name: Fake(name, answer) for name, answer in answers.items()}


class Runs:
    """Runs jobs with a script."""

    def __init__(self, federation: Any, folder: Path) -> None:
        self.federation, self.code = federation, folder
        (folder / "train.py").write_text("print('never run here')\n")
        self.server_folder = federation.folder / "server"
        self.executors = {site: executors() for site in SITES}

    def jobs(self, **job: Any) -> JobsFile:
        settings = {"workflow": "fedavg", "client": {"script": "train.py", "initial": "train.py:net"}, "rounds": 4}
        limits = {"join_deadline_s": 20, "round_deadline_s": 20, "heartbeat_s": 0.5, **job.pop("federation", {})}
        return JobsFile.model_validate({"jobs": [{**settings, **job}], "federation": limits})

    def run(self, **job: Any) -> Model:
        """Return the last model of a whole run."""
        server = self.federation.start(self.federation.server(self.jobs(**job), code=self.code))
        sites = [self.federation.start(self.federation.site(name, self.executors[name])) for name in SITES]
        for each in (server, *sites):
            each.result(60)
        return self.last()

    def last(self) -> Model:
        return {name: value.copy() for name, value in open_file(self.models / "last.safetensors").items()}

    @property
    def models(self) -> Path:
        return self.server_folder / "models" / "fedavg"

    def card(self) -> dict[str, Any]:
        return json.loads((self.models / "model.json").read_text())

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.server_folder / "events.jsonl").read_text().splitlines()]
        return [each for each in lines if each["event"] == name]


@pytest.fixture
def runs(federation: Any, tmp_path: Path) -> Runs:
    folder = tmp_path / "code"
    folder.mkdir()
    return Runs(federation, folder)


def reference(
    rounds: int, combine: Callable[[list[Model]], Model], sites: Callable[[int], Any] = lambda _: SITES
) -> Model:
    model = initial()
    for number in range(rounds):
        model = combine([trained(model, site) for site in sites(number)])
    return model


def mean(weights: list[float]) -> Callable[[list[Model]], Model]:
    def combine(models: list[Model]) -> Model:
        return {
            name: np.average([each[name].astype(np.float64) for each in models], axis=0, weights=weights).astype(
                np.float32
            )
            for name in models[0]
        }

    return combine


def assert_same(found: Model, expected: Model) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6)


def test_mean_of_the_sites_weighted_by_their_examples(runs: Runs) -> None:
    assert_same(runs.run(), reference(4, mean([10, 20, 30])))
    # sites were asked for four rounds, and to evaluate the last model
    assert runs.executors["site-2"][TRAIN].rounds == [0, 1, 2, 3]
    assert runs.executors["site-2"][EVALUATE].rounds == [4]
    assert [each["round"] for each in runs.events("round")] == [0, 1, 2, 3, 4]


def test_mean_of_the_sites_that_count_the_same(runs: Runs) -> None:
    assert_same(runs.run(weighted=False), reference(4, mean([1, 1, 1])))


def test_differences_are_added_to_the_model(runs: Runs) -> None:
    def change(model: FLModel, context: SiteContext) -> FLModel:
        whole = train(model, context)
        whole.params = {name: value - model.params[name] for name, value in whole.params.items()}
        whole.params_type = ParamsType.DIFF
        return whole

    # one site sends differences, the others whole models
    runs.executors["site-2"] = executors(train=change)
    assert_same(runs.run(), reference(4, mean([10, 20, 30])))


@pytest.mark.parametrize(
    ("rule", "options"), [("median", {}), ("trimmed_mean", {"trim": 0.34}), ("krum", {"byzantine": 0})]
)
def test_one_site_that_sends_nonsense_is_withstood(runs: Runs, rule: str, options: dict[str, Any]) -> None:
    def nonsense(model: FLModel, context: SiteContext) -> FLModel:
        answer = train(model, context)
        answer.params = {name: value + np.float32(1e6) for name, value in answer.params.items()}
        return answer

    runs.executors["site-3"] = executors(train=nonsense)
    found = runs.run(aggregate=rule, rounds=2, **options)
    # what withstands it stays among what honest sites sent
    assert all(np.all(value < 10) for value in found.values())


def test_change_out_of_proportion_is_left_out_and_told(runs: Runs) -> None:
    def huge(model: FLModel, context: SiteContext) -> FLModel:
        answer = train(model, context)
        answer.params = {name: value * np.float32(1e20) for name, value in answer.params.items()}
        return answer

    runs.executors["site-3"] = executors(train=huge)
    assert_same(runs.run(norm_bound=5.0), reference(4, mean([10, 20]), lambda _: SITES[:2]))
    assert {each["site"] for each in runs.events("result refused")} == {"site-3"}


def test_so_many_sites_as_the_job_says_take_part_in_a_round(runs: Runs) -> None:
    found = runs.run(sites_per_round=2, weighted=False, rounds=6)
    took = {site: set(runs.executors[site][TRAIN].rounds) for site in SITES}
    assert [sum(number in each for each in took.values()) for number in range(6)] == [2] * 6
    assert len({frozenset(site for site in SITES if number in took[site]) for number in range(6)}) > 1
    expected = reference(6, mean([1, 1]), lambda number: [site for site in SITES if number in took[site]])
    assert_same(found, expected)


def test_server_optimizer_takes_the_mean_change_as_a_gradient(runs: Runs) -> None:
    found = runs.run(optimizer={"name": "adagrad", "learning_rate": 0.5, "beta_1": 0.9, "tau": 0.01})
    model, first = initial(), {name: np.zeros(value.shape) for name, value in initial().items()}
    second = {name: np.full(value.shape, 0.01**2) for name, value in initial().items()}
    combine = mean([10, 20, 30])
    for _ in range(4):
        change = {n: combine([trained(model, site) for site in SITES])[n].astype(float) - model[n] for n in model}
        first = {n: 0.9 * first[n] + 0.1 * change[n] for n in model}
        second = {n: second[n] + change[n] ** 2 for n in model}
        model = {n: (model[n] + 0.5 * first[n] / (np.sqrt(second[n]) + 0.01)).astype(np.float32) for n in model}
    for name, value in model.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [None, {"name": "sgd", "learning_rate": 1.0}])
def test_models_keep_the_dtypes_in_which_sites_make_them(runs: Runs, optimizer: dict[str, Any] | None) -> None:
    begin = {"w": np.zeros(2), "half": np.zeros((), np.float16), "bn.num_batches_tracked": np.array(7)}
    dtypes = {name: value.dtype for name, value in begin.items()}

    def train_in_dtypes(model: FLModel, context: SiteContext) -> FLModel:
        assert {name: value.dtype for name, value in model.params.items()} == dtypes
        params = {name: np.asarray(value + 1, value.dtype) for name, value in model.params.items()}
        return FLModel(params=params, meta={WEIGHT: EXAMPLES_OF[context.site]})

    for site in SITES:
        runs.executors[site] = executors(
            init=lambda *_: FLModel(params=begin),
            train=train_in_dtypes,
            evaluate=lambda *_: FLModel(metrics={"accuracy": 0.5}),
        )
    found = runs.run(optimizer=optimizer)
    assert {name: value.dtype for name, value in found.items()} == dtypes
    assert {name: value.tolist() for name, value in found.items()} == {
        "w": [4.0, 4.0], "half": 4.0, "bn.num_batches_tracked": 11
    }  # fmt: skip


@pytest.mark.parametrize("weighted", [True, False])
def test_scaffold_moves_the_control_variate_by_the_sites_changes(runs: Runs, weighted: bool) -> None:
    seen: dict[int, np.ndarray[Any, Any]] = {}

    def with_variate(model: FLModel, context: SiteContext) -> FLModel:
        own = {name: value for name, value in model.params.items() if not name.startswith("scaffold/")}
        seen[model.current_round] = model.params["scaffold/layer.weight"].copy()
        answer = FLModel(params=trained(own, context.site), meta={WEIGHT: EXAMPLES_OF[context.site]})
        step = np.float32(context.site[-1])
        answer.params |= {f"scaffold/{name}": np.full_like(value, step) for name, value in own.items()}
        return answer

    def last(model: FLModel, context: SiteContext) -> FLModel:
        return FLModel(metrics={"accuracy": 0.5})

    runs.executors = {site: executors(train=with_variate, evaluate=last) for site in SITES}
    weights = [10, 20, 30] if weighted else [1, 1, 1]
    assert_same(runs.run(scaffold=True, weighted=weighted), reference(4, mean(weights)))
    # the mean of 1, 2 and 3 over all sites, each round
    move = float(np.average([1, 2, 3], weights=weights))
    assert [float(seen[number].mean()) for number in range(4)] == pytest.approx([0, move, 2 * move, 3 * move])


def test_excluded_parameters_never_reach_the_server(runs: Runs) -> None:
    found = runs.run(exclude=["bn.*"])
    assert set(found) == {"layer.weight"}


def test_fedbn_averages_all_but_what_each_site_keeps(runs: Runs) -> None:
    """Against FedBN's Algorithm 1 as a plain loop: normalization stays local and learns, the rest is averaged."""
    weights = [10, 20, 30]

    def step(shared: np.ndarray[Any, Any], own: np.ndarray[Any, Any], site: str) -> tuple[Any, Any]:
        # each acts on the other, so that an average of what stays, or a fresh one each round, would show
        return shared * np.float32(0.5) + own.sum() + np.float32(site[-1]), own * np.float32(0.9) + shared.mean()

    kept = {site: np.full(2, site[-1], np.float32) for site in SITES}

    def trains(model: FLModel, context: SiteContext) -> FLModel:
        assert set(model.params) == {"layer.weight"}
        shared, kept[context.site] = step(model.params["layer.weight"], kept[context.site], context.site)
        return FLModel(params={"layer.weight": shared}, meta={WEIGHT: EXAMPLES_OF[context.site]})

    runs.executors = {
        site: executors(train=trains, evaluate=lambda *_: FLModel(metrics={"accuracy": 0.5})) for site in SITES
    }
    found = runs.run(exclude=["bn.*"])

    shared, own = initial()["layer.weight"], {site: np.full(2, site[-1], np.float32) for site in SITES}
    for _ in range(4):
        moved = {site: step(shared, own[site], site) for site in SITES}
        own = {site: kept_there for site, (_, kept_there) in moved.items()}
        shared = mean(weights)([{"w": moved[site][0]} for site in SITES])["w"]
    assert_same(found, {"layer.weight": shared})
    for site in SITES:
        np.testing.assert_allclose(kept[site], own[site], rtol=1e-6)
    assert not np.allclose(kept["site-1"], kept["site-3"])


@pytest.mark.parametrize(("ties", "best"), [("first", 1), ("last", 2)])
def test_best_model_is_chosen_by_the_metric_that_the_job_names(runs: Runs, ties: str, best: int) -> None:
    losses = {0: 3.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 2.5}

    def scored(model: FLModel, context: SiteContext) -> FLModel:
        answer = train(model, context)
        answer.metrics = {"loss": losses[model.current_round]}
        return answer

    tried = lambda model, _: FLModel(metrics={"loss": losses[model.current_round]})  # noqa: E731
    runs.executors = {site: executors(train=scored, evaluate=tried) for site in SITES}
    last = runs.run(selection={"metric": "loss", "best": "lowest", "ties": ties})
    card = runs.card()
    assert (card["best"]["round"], card["last"]["round"], card["value"]) == (best, 4, 1.0)
    content = (runs.models / "best.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == card["best"]["sha256"]
    assert_same(dict(open_file(runs.models / "best.safetensors")), reference(best, mean([10, 20, 30])))
    assert_same(last, reference(4, mean([10, 20, 30])))


def test_run_stops_early_without_a_better_model(runs: Runs) -> None:
    def scored(model: FLModel, context: SiteContext) -> FLModel:
        answer = train(model, context)
        answer.metrics = {"accuracy": 0.5 if model.current_round else 0.9}
        return answer

    runs.executors = {site: executors(train=scored) for site in SITES}
    runs.run(patience=2, rounds=50)
    assert (runs.card()["best"]["round"], runs.card()["last"]["round"]) == (0, 2)


def test_server_that_was_stopped_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    options = {"optimizer": {"name": "adam", "learning_rate": 0.1}, "rounds": 5}
    stop = {"at": 3}

    def failing(model: FLModel, context: SiteContext) -> FLModel:
        if model.current_round == stop["at"]:
            raise FederationError("stopped here")
        return train(model, context)

    runs.executors = {site: executors(train=failing) for site in SITES}
    server = runs.federation.start(runs.federation.server(runs.jobs(**options), code=runs.code))
    sites = [runs.federation.start(runs.federation.site(name, runs.executors[name])) for name in SITES]
    with pytest.raises(FederationError, match="round 3"):
        server.result(60)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(60)
    stop["at"] = -1
    runs.executors = {site: executors(train=failing) for site in SITES}
    again = runs.run(**options)
    assert runs.executors["site-1"][TRAIN].rounds == [3, 4]
    broken = hashlib.sha256((runs.models / "last.safetensors").read_bytes()).hexdigest()
    runs.server_folder = runs.federation.folder / "server"
    for name in ("server", *SITES):
        (runs.federation.folder / name).rename(tmp_path / f"first-{name}")
    runs.executors = {site: executors() for site in SITES}
    assert_same(runs.run(**options), again)
    assert hashlib.sha256((runs.models / "last.safetensors").read_bytes()).hexdigest() == broken


def test_weight_above_the_registered_examples_is_refused(runs: Runs) -> None:
    def greedy(model: FLModel, context: SiteContext) -> FLModel:
        answer = train(model, context)
        answer.meta = {WEIGHT: 1e12}
        return answer

    runs.executors["site-1"] = executors(train=greedy)
    found = runs.run(federation={"min_sites": 2})
    assert_same(found, reference(4, mean([20, 30]), lambda _: SITES[1:]))
    assert "above the 10" in runs.events("result refused")[0]["reason"]


def test_model_without_a_beginning_is_said_clearly(runs: Runs) -> None:
    jobs = runs.jobs(client={"script": "train.py"})
    server = runs.federation.start(runs.federation.server(jobs, code=runs.code))
    for name in SITES:
        runs.federation.start(runs.federation.site(name, runs.executors[name]))
    with pytest.raises(Exception, match="no initial model"):
        server.result(60)


@pytest.mark.parametrize("quantization", [None, {"to_server": "float16"}])
def test_files_give_the_bits_of_memory(runs: Runs, tmp_path: Path, quantization: Any) -> None:
    write_file(runs.code / "begin.safetensors", initial())
    options = {"model": "begin.safetensors", "client": {"script": "train.py"}, "quantization": quantization}
    expected = runs.run(**options)
    for name in ("server", *SITES):
        (runs.federation.folder / name).rename(tmp_path / f"memory-{name}")
    runs.executors = {site: executors() for site in SITES}
    found = runs.run(aggregation="file", **options)
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in expected.items()}
    if quantization is None:
        assert_same(found, reference(4, mean([10, 20, 30])))


def test_file_mode_says_what_needs_memory(runs: Runs) -> None:
    with pytest.raises(ValueError, match="optimizer: needs aggregation: memory"):
        runs.jobs(aggregation="file", model="m.safetensors", optimizer={"name": "adam"})
    with pytest.raises(ValueError, match="needs model"):
        runs.jobs(aggregation="file")


def test_metric_that_no_site_reports_is_said_after_the_first_round(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    runs.run(rounds=2, selection={"metric": "acuracy"})
    [said] = runs.events("metric missing")
    assert (said["job"], said["metric"]) == ("fedavg", "acuracy")
    assert "no site reports 'acuracy'; reported: accuracy; did you mean 'accuracy'" in said["reason"]
    assert said["reason"] in caplog.text


def test_metric_that_sites_report_is_not_said_to_be_missing(runs: Runs) -> None:
    runs.run(rounds=1)
    assert runs.events("metric missing") == []


def test_audit_log_has_job_bytes_and_digest_of_every_result_and_model(runs: Runs) -> None:
    last = runs.run(rounds=2)
    accepted = runs.events("result accepted")
    assert {each["job"] for each in accepted} == {"fedavg"}
    trained = [each for each in accepted if each["task"] == TRAIN]
    assert sorted((each["round"], each["site"], each["weight"]) for each in trained) == [
        (number, site, EXAMPLES_OF[site]) for number in range(2) for site in SITES
    ]
    for site in SITES:
        sent = (runs.federation.folder / site / "events.jsonl").read_text().splitlines()
        left = [each["bytes"] for each in map(json.loads, sent) if each.get("topic") == "result"]
        assert sum(left) == sum(each["bytes"] for each in accepted if each["site"] == site)
    assert all(len(each["digest"]) == 64 for each in trained)
    # the model that was tried last is the one that is published
    [closed] = [each for each in runs.events("task closed") if each["task"] == EVALUATE]
    payload = TensorPayload({PARAMS + name: value for name, value in last.items()})
    assert closed["digest"] == payload.digest().hex()
