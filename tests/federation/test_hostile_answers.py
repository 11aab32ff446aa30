"""What one site says and cannot be true costs that site its part in the job, and the others nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbio.classifier.unsure import BINS
from fedbio.errors import FederationError, ProtocolError, TransportError
from fedbio.federation import FLModel, Result, SiteContext, messages
from fedbio.federation.messages import Join, pack
from fedbio.federation.model import WEIGHT, encode
from fedbio.federation.workflows import study_checks
from fedbio.federation.workflows.study import Alone, Description, Embedded, Evaluation, Points, RunSpec, Study, meta
from fedbio.results import ClassCounts, EncoderInfo, MapPoint, read_party
from fedbio.settings import JobsFile
from fedbio.transport import BlobPayload, SiteEndpoint

from .conftest import SITES, _Fake, fakes

CLASSES = ("Nucleus", "Plastid")
ENCODER = EncoderInfo("tiny", "0" * 64, True, 4, "mean", 1, "float32", 128, "cut")
EVALUATION = Evaluation([[2, 0], [1, 1]], 0.25)
SPEC = RunSpec(
    study=Study(classes=CLASSES), hidden="3", seed=0, rounds=3, epochs=1, batch_size=1, learning_rate=0.1,
    weight_decay=0.0, dropout=0.0, patience=8,
)  # fmt: skip


def described(counts: dict[str, int], **encoder: Any) -> FLModel:
    return FLModel(meta=meta(Description(ClassCounts(counts), msgspec.structs.replace(ENCODER, **encoder))))


def evaluated(**change: Any) -> FLModel:
    return FLModel(meta=meta(msgspec.structs.replace(EVALUATION, **change)))


def alone(**change: Any) -> FLModel:
    honest = Alone(1, [(0, 0.5, 0.1, None), (1, 0.5, 0.1, None)], EVALUATION)
    return FLModel(meta=meta(msgspec.structs.replace(honest, **change)))


def summed(residues: float | None = None, **change: Any) -> FLModel:
    """Sums over 30 proteins."""
    params = {"sum": np.zeros(4), "squares": np.full(4, 30.0), **change}
    if residues is not None:
        params["count"] = np.array([residues])
    return FLModel(params=params, meta={WEIGHT: 30})


def pointed(**change: Any) -> FLModel:
    return FLModel(meta=meta(Points([MapPoint("site-3", "Nucleus", "test", 0.0, 1.0)._replace(**change)])))


def check(task: str) -> Callable[[Result], None]:
    return {
        "describe": study_checks.description_answer(CLASSES),
        "moments": study_checks.moments_answer(2),
        "scatter": study_checks.scatter_answer,
        "train_alone": study_checks.alone_answer(SPEC),
        "evaluate": study_checks.evaluation_answer(2),
        "project": study_checks.points_answer(CLASSES),
        "weights": study_checks.weights_answer({"a" * 64}),
        "embed": study_checks.embedded_answer,
    }[task]


HONEST = [
    ("describe", described({"Nucleus": 30})),
    ("describe", described({})),
    ("moments", summed()),
    ("moments", summed(60.0)),
    ("moments", FLModel(meta={WEIGHT: 0})),
    ("scatter", FLModel(params={"products": np.full((4, 4), -9.0)}, meta={WEIGHT: 30})),
    ("scatter", FLModel(meta={WEIGHT: 0})),
    ("train_alone", alone()),
    ("train_alone", alone(best_round=0, curve=[])),
    ("evaluate", evaluated()),
    ("evaluate", evaluated(confidence=[[0] * BINS, [0] * BINS])),
    ("project", pointed()),
    ("weights", FLModel(meta={"missing": ["a" * 64]})),
    ("weights", FLModel()),
    ("embed", FLModel(meta=meta(Embedded(1, 2, 0, 0, 1.0, ENCODER)))),
]

HOSTILE = [
    ("describe", FLModel(), "not a Description"),
    ("describe", described({"Nucleus": -1}), "a count of -1"),
    ("describe", described({"Nucleus": 1 << 60}), "a count of 1152921504606846976"),
    ("describe", described({"Nucleus": 3, "x": 3}), "'x', which is no class"),
    ("describe", described({}, width=0), "width 0"),
    ("describe", described({}, width=1 << 40), "width 1099511627776"),
    ("moments", summed(squares=np.array([1.0, -1e-9, 1.0, 1.0])), "is negative"),
    ("moments", summed(squares=np.full(4, 1e300)), "beyond what float32"),
    ("moments", summed(sum=np.array([0.0, 0.0, 0.0, -1e300])), "beyond what float32"),
    ("moments", summed(61.0), "61 residues of 30 proteins"),
    ("moments", summed(29.0), "29 residues of 30 proteins"),
    ("scatter", FLModel(params={"products": np.full((4, 4), 1e300)}, meta={WEIGHT: 30}), "beyond what float32"),
    ("train_alone", FLModel(), "not a Alone"),
    ("train_alone", alone(best_round=-1), "not one of 3 rounds"),
    ("train_alone", alone(curve=[(4, None, None, None)]), "not one of 3 rounds"),
    ("train_alone", alone(curve=[(0, None, None, None)] * 2), "not one of 3 rounds"),
    ("train_alone", alone(curve=[(0, None, float("inf"), None)]), "is inf"),
    ("train_alone", alone(test=Evaluation([], 0.0)), "confusion matrix is not 2 rows of 2"),
    ("evaluate", FLModel(meta={"confusion": "many"}), "not a Evaluation"),
    ("evaluate", evaluated(confusion=[[1, 2]]), "confusion matrix is not 2 rows of 2"),
    ("evaluate", evaluated(confusion=[[1, 2], [-1, 0]]), "a count of -1"),
    ("evaluate", evaluated(confusion=[[1, 2], [(1 << 64) - 1, 0]]), "a count of 18446744073709551615"),
    ("evaluate", evaluated(confidence=[[0] * BINS, [0]]), "table of confidence is not 2 rows of 50"),
    ("evaluate", evaluated(loss=float("nan")), "is nan"),
    ("project", FLModel(meta={"points": 3}), "not a Points"),
    ("project", pointed(x=float("nan")), "is nan"),
    ("project", pointed(target="<b>"), "'<b>'"),
    ("project", pointed(split="nowhere"), "'nowhere'"),
    ("weights", FLModel(meta={"missing": 3}), "not a list"),
    ("weights", FLModel(meta={"missing": ["b" * 64]}), "no part of the encoder"),
    ("weights", FLModel(meta={"missing": [["a"]]}), "no part of the encoder"),
    ("embed", FLModel(meta={"proteins": []}), "not a Embedded"),
]


@pytest.mark.parametrize(("task", "model"), HONEST)
def test_honest_answers_pass(task: str, model: FLModel) -> None:
    check(task)(Result(task="1", model=model, site="site-3"))


@pytest.mark.parametrize(("task", "model", "reason"), HOSTILE)
def test_answers_that_cannot_be_true_are_refused(task: str, model: FLModel, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        check(task)(Result(task="1", model=model, site="site-3"))


def test_confidence_is_checked_as_classifiers_count_it() -> None:
    assert study_checks.CONFIDENCE_SHAPE == (2, BINS)


def refusals(federation: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (federation.folder / "server" / "events.jsonl").read_text().splitlines()]
    return [each for each in lines if each["event"] == "result refused"]


def answering(task: str, answer: Callable[[FLModel, SiteContext], FLModel]) -> Any:
    found = fakes()
    found[task].answer = answer
    return found


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("describe", FLModel()),
        ("describe", described({"Nucleus": 30}, weights_sha256="1" * 64)),
        ("moments", summed(squares=np.full(4, -1.0))),
        ("train_alone", alone(test=Evaluation([], 0.0))),
        ("evaluate", evaluated(confidence=[[1]])),
    ],
)
def test_study_goes_on_without_a_site_that_says_nonsense(federation: Any, task: str, answer: FLModel) -> None:
    saved: list[Any] = []
    jobs = federation.jobs(rounds=2, min_sites=2)
    server = federation.start(federation.server(jobs, save_model=lambda *found: saved.append(found)))
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    sites.append(federation.start(federation.site("site-3", answering(task, lambda *_: answer))))
    for each in (*sites, server):
        each.result(30)
    assert len(saved) == 1
    refused = refusals(federation)
    assert {(each["site"], each["task"], each["job"]) for each in refused} == {("site-3", task, "classify")}
    record = read_party(federation.folder / "server" / "party.json")
    assert ("site-3" in record.federation) is (task != "describe")


def test_study_ends_with_the_reason_where_that_site_is_needed(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(rounds=2)))
    sites = [federation.start(federation.site(name)) for name in SITES[:2]]
    sites.append(federation.start(federation.site("site-3", answering("evaluate", lambda *_: FLModel()))))
    with pytest.raises(FederationError, match=r"3 are needed; site-3: its result was refused: not a Evaluation"):
        server.result(30)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(30)


def test_study_of_two_encoders_ends_where_nobody_can_say_who_is_right(federation: Any) -> None:
    other = described({"Nucleus": 30}, weights_sha256="1" * 64)
    jobs = federation.jobs(rounds=2).model_copy(update={"sites": ["site-1", "site-3"]})
    server = federation.start(federation.server(jobs))
    sites = [federation.start(federation.site("site-1"))]
    sites.append(federation.start(federation.site("site-3", answering("describe", lambda *_: other))))
    with pytest.raises(FederationError, match="embeddings differ in weights_sha256"):
        server.result(30)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(30)


def test_map_is_drawn_without_a_site_that_says_nonsense(federation: Any) -> None:
    def placed(model: FLModel, context: SiteContext) -> FLModel:
        assert model.params["components"].shape == (4, 2)
        return pointed(site=context.site)

    def site(name: str, **bad: FLModel) -> Any:
        products = np.diag([4.0, 3.0, 2.0, 1.0])
        count = 10 * int(name[-1])
        answers: dict[str, Callable[[FLModel, SiteContext], FLModel]] = {
            "scatter": lambda *_: FLModel(params={"products": products}, meta={WEIGHT: count}),
            "project": placed,
            "show_map": lambda *_: FLModel(),
        }
        answers |= {task: lambda *_, model=model: model for task, model in bad.items()}
        own = fakes() | {task: _Fake(task, "map", answer) for task, answer in answers.items()}
        return federation.site(name, own, allow=("statistics", "map"))

    jobs = JobsFile.model_validate(
        {
            "jobs": [{"workflow": "projection"}],
            "federation": {"min_sites": 1, "join_deadline_s": 20, "round_deadline_s": 20},
        }
    )
    server = federation.start(federation.server(jobs))
    hostile = {"project": pointed(x=float("inf"))}
    scattered = {"scatter": FLModel(params={"products": np.full((4, 4), 1e308)}, meta={WEIGHT: 30})}
    sites = [federation.start(site("site-1")), federation.start(site("site-2", **hostile))]
    sites.append(federation.start(site("site-3", **scattered)))
    for each in (*sites, server):
        each.result(30)
    assert {(each["site"], each["task"]) for each in refusals(federation)} == {
        ("site-2", "project"),
        ("site-3", "scatter"),
    }
    rows = (federation.folder / "server" / "map.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[0] for row in rows) == ["site-1", "site-3"]


@pytest.mark.parametrize(
    ("missing", "reason"), [(lambda every: every, "again and again"), (lambda _: ["b" * 64], "no part of the encoder")]
)
def test_encoder_goes_to_the_others_where_one_site_asks_for_nonsense(
    federation: Any, tmp_path: Path, missing: Callable[[list[str]], list[str]], reason: str
) -> None:
    (tmp_path / "encoder.pt").write_bytes(b"PK\x03\x04")

    def site(name: str) -> Any:
        def lacks(model: FLModel, context: SiteContext) -> FLModel:
            every = [each["sha256"] for each in model.meta["files"]]
            return FLModel(meta={"missing": missing(every) if name == "site-3" else []})

        embedded = FLModel(meta=meta(Embedded(1, 2, 0, 0, 1.0, ENCODER)))
        own = {"weights": _Fake("weights", "embed", lacks), "embed": _Fake("embed", "embed", lambda *_: embedded)}
        return federation.site(name, own, allow=("embed",))

    jobs = JobsFile.model_validate(
        {
            "jobs": [{"workflow": "embed", "encoder": {"name": str(tmp_path / "encoder.pt")}}],
            "federation": {"min_sites": 2, "join_deadline_s": 20, "round_deadline_s": 20},
        }
    )
    server = federation.start(federation.server(jobs))
    sites = [federation.start(site(name)) for name in SITES]
    for each in (*sites, server):
        each.result(30)
    [refused] = refusals(federation)
    assert (refused["site"], refused["task"], refused["job"]) == ("site-3", "weights", "embed")
    assert reason in refused["reason"]
    assert read_party(federation.folder / "server" / "party.json").encoder == ENCODER


@pytest.mark.parametrize(("min_sites", "goes_on"), [(2, True), (3, False)])
def test_site_that_has_embedded_with_other_weights_is_left_out_if_the_others_are_enough(
    federation: Any, min_sites: int, goes_on: bool
) -> None:
    def site(name: str) -> Any:
        encoder = msgspec.structs.replace(ENCODER, weights_sha256="1" * 64) if name == "site-1" else ENCODER
        embedded = FLModel(meta=meta(Embedded(1, 2, 0, 0, 1.0, encoder)))
        return federation.site(name, {"embed": _Fake("embed", "embed", lambda *_: embedded)}, allow=("embed",))

    jobs = JobsFile.model_validate(
        {
            "jobs": [{"workflow": "embed", "encoder": {"name": "esm1nv-44m"}}],
            "federation": {"min_sites": min_sites, "join_deadline_s": 20, "round_deadline_s": 20},
        }
    )
    server = federation.start(federation.server(jobs))
    sites = [federation.start(site(name)) for name in SITES]
    if goes_on:
        for each in (*sites, server):
            each.result(30)
        assert [(each["site"], each["task"]) for each in refusals(federation)] == [("site-1", "embed")]
        assert read_party(federation.folder / "server" / "party.json").encoder == ENCODER
        return
    with pytest.raises(FederationError, match="different weights: site-1 111111111111, site-2 000000000000"):
        server.result(30)
    for each in sites:
        with pytest.raises(FederationError):
            each.result(30)


def test_result_that_nobody_asked_for_is_refused_before_its_bytes_come(federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(join_deadline_s=2)))
    site = SiteEndpoint(
        federation.address,
        federation.credentials("site-1"),
        spool=federation.folder / "hostile",
        on_message=lambda received: None,
        driver="memory",
        connect_deadline_s=20,
    ).start()
    try:
        site.send(messages.JOIN, pack(Join(version="0")))
        body, _ = encode(Result(task="never asked for"))
        with pytest.raises(TransportError, match="a payload of 83886080 bytes, at most 67108864 are allowed"):
            site.send(messages.RESULT, body, BlobPayload(bytes(80 << 20)))
    finally:
        site.close()
    with pytest.raises(FederationError, match="site-2"):
        server.result(30)
    events = (federation.folder / "server" / "events.jsonl").read_text().splitlines()
    [refused] = [each for each in map(json.loads, events) if each["event"] == "result refused"]
    assert refused["site"] == "site-1"
    assert refused["reason"] == "it has 83886080 bytes, at most 67108864 were asked for"
