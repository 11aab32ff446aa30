"""Models of rounds travel in the scheme of the job, what a scheme loses is not lost, and no other scheme is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FederationError, FormatError
from fedbio.federation import FLModel
from fedbio.federation.quantization import Packer
from fedbio.results import read_party
from fedbio.settings import SCHEMES, Transport
from fedbio.settings_parts import ServerTransport
from fedbio.tensors import SCHEMES as CODECS
from fedbio.tensors import LayoutReader
from fedbio.transport import Limits, Payload

SITES = ("site-1", "site-2", "site-3")


def received(payload: Payload | None) -> dict[str, np.ndarray[Any, Any]]:
    """What comes out of a payload at its receiver."""
    assert payload is not None
    reader = LayoutReader()
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    for chunk in payload.chunks():
        for piece in reader.feed(chunk):
            found.setdefault(piece.name, []).append(piece.values.copy())
    assert reader.specs is not None
    return {name: np.concatenate(parts).reshape(reader.specs[name][0]) for name, parts in found.items()}


def sent(folder: Path, **having: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [
        each
        for each in lines
        if each["event"] == "sent" and all(each.get(key) == value for key, value in having.items())
    ]


def run(federation: Any, jobs: Any, **sites: Any) -> None:
    """Run all parties to their end; raises what the server raised."""
    server = federation.start(federation.server(jobs))
    running = [federation.start(sites.get(name) or federation.site(name)) for name in SITES]
    try:
        server.result(30)
    finally:
        errors = [each.exception(30) for each in running]
    assert errors == [None] * len(SITES)


def test_settings_name_every_scheme_and_every_limit() -> None:
    assert tuple(SCHEMES) == tuple(CODECS)
    assert ServerTransport().model_dump() == {
        name: getattr(Limits(), name) for name in (*Transport.model_fields, "max_peers", "max_handshakes")
    }
    assert set(ServerTransport.model_fields) == set(Limits.__slots__)


def test_rounds_travel_in_the_schemes_of_the_job_and_all_else_exact(federation: Any) -> None:
    quantization = {"to_sites": "float16", "to_server": "nf4"}
    run(federation, federation.jobs(mlp="4096", rounds=2, quantization=quantization))
    model = 4 * (4 * 4096 + 4096 + 2 * 4096 + 2)
    rounds = sent(federation.folder / "server", to="site-2", scheme="float16")
    # two rounds of training, and the last model's validation
    assert len(rounds) == 3
    assert all(0.5 * model < each["bytes"] < 0.6 * model for each in rounds)
    answers = sent(federation.folder / "site-2", scheme="nf4")
    assert len(answers) == 2
    assert all(0.14 * model < each["bytes"] < 0.26 * model for each in answers)
    # the test of the best model, and the publication: what is measured is what everybody gets
    exact = [each for each in sent(federation.folder / "server", to="site-2") if each["bytes"] > model]
    assert ["scheme" in each for each in exact] == [False, False]
    record = read_party(federation.folder / "site-2" / "party.json")
    assert record.sent["model"].bytes == sum(each["bytes"] for each in answers)
    assert all("scheme" not in each for each in sent(federation.folder / "site-2", kind="sums"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_model_comes_out_near_what_it_would_be(federation: Any, scheme: str) -> None:
    saved = []
    server = federation.start(
        federation.server(
            federation.jobs(mlp="512", rounds=2, quantization=scheme), save_model=lambda *found: saved.append(found)
        )
    )
    for each in [*(federation.start(federation.site(name)) for name in SITES), server]:
        each.result(30)
    # each round adds 7/3
    np.testing.assert_allclose(saved[0][0]["layers.0.weight"], 14 / 3, rtol=5e-3)


def test_site_that_does_not_take_a_scheme_is_named(federation: Any) -> None:
    reluctant = federation.site("site-3", quantization=("float16",))
    with pytest.raises(
        FederationError, match=r"site-3: task was not accepted: .*quantized as 'nf4'; accepted here: float16"
    ):
        run(federation, federation.jobs(mlp="512", quantization="nf4"), **{"site-3": reluctant})


def test_site_that_lets_no_model_leave_in_a_scheme_says_so(federation: Any) -> None:
    reluctant = federation.site("site-3", quantization=("float16", "bfloat16"))
    with pytest.raises(
        FederationError,
        match=r"site-3: refused: the policy of site-3 lets no model leave as int8 \(allowed: float16, bfloat16\)",
    ):
        run(federation, federation.jobs(mlp="512", quantization={"to_server": "int8"}), **{"site-3": reluctant})


@pytest.mark.slow
@pytest.mark.parametrize(("agreed", "accepted"), [(None, "none"), ("float16", "float16")])
def test_answer_in_a_scheme_that_was_not_agreed_is_refused(federation: Any, agreed: str | None, accepted: str) -> None:
    headstrong = federation.site("site-3")

    class Always(Packer):
        def pack(self, tensors: Any, scheme: Any = None, **options: Any) -> Any:
            return super().pack(tensors, "nf4", **options)

    headstrong._answers._packer = Always()
    with pytest.raises(
        FederationError,
        match=rf"site-3: failed: .*result was not accepted: .*quantized as 'nf4'; accepted here: {accepted}",
    ):
        run(federation, federation.jobs(mlp="512", quantization={"to_server": agreed}), **{"site-3": headstrong})


def test_value_that_a_scheme_cannot_hold_fails_the_task_at_once(federation: Any) -> None:
    executors = federation.fakes()
    executors["train"].answer = lambda model, _: FLModel(
        params={name: value + np.float32(1e6) for name, value in model.params.items() if name.startswith("layers.")}
    )
    with pytest.raises(FederationError, match=r"site-3: failed: its model cannot be sent: tensor .*float16"):
        run(
            federation,
            federation.jobs(mlp="512", quantization={"to_server": "float16"}),
            **{"site-3": federation.site("site-3", executors)},
        )


# what a scheme takes

UPDATE = np.random.default_rng(5).standard_normal((64, 64)).astype(np.float32)


def test_what_is_lost_of_one_model_is_added_to_the_next() -> None:
    packer = Packer()
    total = np.zeros_like(UPDATE, np.float64)
    for _ in range(20):
        total += received(packer.pack({"params/x": UPDATE}, "fp4", feedback="run"))["params/x"]
    once = received(Packer().pack({"params/x": UPDATE}, "fp4"))["params/x"] - UPDATE
    assert np.linalg.norm(total - 20.0 * UPDATE) < 1.5 * np.linalg.norm(once)


def test_residual_belongs_to_one_run_and_one_scheme() -> None:
    packer = Packer()
    first = received(packer.pack({"params/x": UPDATE}, "nf4", feedback="one"))["params/x"]
    assert not np.array_equal(received(packer.pack({"params/x": UPDATE}, "nf4", feedback="one"))["params/x"], first)
    for run_, scheme in (("two", "nf4"), ("two", "fp4"), ("one", "nf4")):
        fresh = received(Packer().pack({"params/x": UPDATE}, scheme))["params/x"]
        found = received(packer.pack({"params/x": UPDATE}, scheme, feedback=run_))["params/x"]
        np.testing.assert_array_equal(found, fresh)


def test_payload_that_is_sent_again_is_the_same() -> None:
    payload = Packer().pack({"params/x": UPDATE}, "nf4", feedback="run")
    np.testing.assert_array_equal(received(payload)["params/x"], received(payload)["params/x"])


def test_what_is_no_trained_parameter_travels_exact() -> None:
    tensors = {"params/x": UPDATE, "params/standardizer.mean": UPDATE[0].repeat(32), "optimizer/x": UPDATE}
    for feedback in ("", "run"):
        found = received(Packer().pack(tensors, "fp4", exact={"standardizer.mean"}, feedback=feedback))
        for name in ("params/standardizer.mean", "optimizer/x"):
            np.testing.assert_array_equal(found[name], tensors[name])
        assert not np.array_equal(found["params/x"], UPDATE)


def test_residual_is_forgotten_with_a_model_that_cannot_be_quantized() -> None:
    packer = Packer()
    packer.pack({"params/x": UPDATE}, "nf4", feedback="run")
    with pytest.raises(FormatError, match="not finite"):
        packer.pack({"params/x": UPDATE * np.float32(np.nan)}, "nf4", feedback="run")
    fresh = received(Packer().pack({"params/x": UPDATE}, "nf4"))["params/x"]
    np.testing.assert_array_equal(received(packer.pack({"params/x": UPDATE}, "nf4", feedback="run"))["params/x"], fresh)


@pytest.mark.parametrize("feedback", [False, True])
def test_steps_smaller_than_a_schemes_gather_until_they_count(feedback: bool) -> None:
    """Averaging whole models: each end goes on from what it received, so that what is late still arrives."""
    step, rounds = np.float32(0.004), 50
    ends, run_ = [Packer() for _ in range(3)], "run" if feedback else ""
    model = UPDATE
    for _ in range(rounds):
        at_sites = received(ends[0].pack({"params/x": model}, "nf4", feedback=run_))["params/x"]
        answers = [
            received(end.pack({"params/x": at_sites + step}, "nf4", feedback=run_))["params/x"] for end in ends[1:]
        ]
        model = np.mean(answers, axis=0).astype(np.float32)
    moved = float(np.mean(model - UPDATE))
    if feedback:
        assert moved == pytest.approx(rounds * step, rel=0.1)
    else:
        assert abs(moved - rounds * step) > 0.5 * rounds * step
