"""Scripts come to the sites that can take them: who cannot now may later, and nobody waits for who has left."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedbio.errors import FederationError, PeerUnreachable
from fedbio.federation import FLModel, SiteContext
from fedbio.federation.controller import Controller
from fedbio.federation.messages import FileHeader
from fedbio.federation.open_task import is_own_reason
from fedbio.federation.workflows import deployment, streaming
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.script import END, EXAMPLES, TRAIN
from fedbio.federation.workflows.streaming import stream_files
from fedbio.results import EventLog

from .test_script_fedavg import Runs, assert_same, executors, initial, mean, runs, trained

__all__ = ["runs"]


@pytest.mark.parametrize("nonsense", ["many", -1, True, 1.5, None, 1 << 60])
def test_site_that_registers_nonsense_is_left_out_until_it_registers_a_number(runs: Runs, nonsense: Any) -> None:
    said = iter([nonsense, nonsense, 30, 30])

    def deploy(model: FLModel, context: SiteContext) -> FLModel:
        return FLModel(meta={EXAMPLES: next(said)})

    runs.executors["site-3"] = executors(deploy=deploy)
    # asked at the beginning, for the model of round 0, and then in every round
    found = runs.run(rounds=2, federation={"min_sites": 2})
    refused = runs.events("result refused")
    assert [(each["job"], each["site"]) for each in refused] == [("fedavg", "site-3")] * 2
    assert "registers" in refused[0]["reason"]
    assert runs.executors["site-3"][TRAIN].rounds == [0, 1]
    model = initial()
    for _ in range(2):
        model = mean([10, 20, 30])([trained(model, site) for site in ("site-1", "site-2", "site-3")])
    assert_same(found, model)


def test_too_few_sites_that_register_end_the_job_with_the_reason(runs: Runs) -> None:
    runs.executors["site-3"] = executors(deploy=lambda *_: FLModel(meta={EXAMPLES: "many"}))
    with pytest.raises(FederationError, match=r"site-3: its result was refused: it registers 'many' examples"):
        runs.run()


def test_site_that_failed_is_asked_again_only_when_its_next_process_has_come() -> None:
    assert is_own_reason("failed: no torch here")
    assert is_own_reason("refused: the policy")
    assert not is_own_reason("has not answered")
    assert not is_own_reason("is gone since 3 s")
    assert not is_own_reason("its result was refused: it registers -1 examples")


def test_finished_job_does_not_wait_for_a_site_that_has_left(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    end = Deployment.end

    def ended_without_site_3(self: Deployment) -> None:
        desk = self.runtime.desk._desk
        # what the server does when a connection ends; back, the site hears that the server is done
        desk.lost("site-3")
        end(self)
        desk.back("site-3")

    monkeypatch.setattr(Deployment, "end", ended_without_site_3)
    runs.run(rounds=1, federation={"round_deadline_s": 3})
    assert [each["job"] for each in runs.events("job done")] == ["fedavg"]
    ended = {site: runs.executors[site][END].rounds for site in ("site-1", "site-2", "site-3")}
    assert ended == {"site-1": [0], "site-2": [0], "site-3": []}


def test_finished_job_does_not_wait_a_whole_round_for_a_script_to_end(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    end = Deployment.end

    def ended(self: Deployment) -> None:
        end(self)
        over.set()

    monkeypatch.setattr(deployment, "END_S", 0.2)
    monkeypatch.setattr(Deployment, "end", ended)
    waited: list[bool] = []

    def late(model: FLModel, context: SiteContext) -> FLModel:
        waited.append(over.wait(15))
        return FLModel()

    runs.executors["site-3"] = executors(end=late)
    runs.run(rounds=1, federation={"round_deadline_s": 20})
    assert waited == [True]
    assert [each["missing"] for each in runs.events("task closed") if each["task"] == END] == [
        {"site-3": "has not answered"}
    ]


def test_files_reach_the_others_while_sites_are_away_and_the_deadline_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "RETRY_S", 0.01)
    attempts: list[str] = []

    def send_file(site: str, path: Path, header: FileHeader, kind: str) -> None:
        attempts.append(f"{site} {header.name}")
        if site.startswith("away") or (site == "late" and len(attempts) < 6):
            raise PeerUnreachable(f"{site} is not connected")

    events = EventLog(tmp_path, "server")
    runtime = SimpleNamespace(
        send_file=send_file,
        events=events,
        limits=SimpleNamespace(round_deadline_s=0.3),
        desk=SimpleNamespace(check=lambda: None),
    )
    files = [(tmp_path / name, FileHeader("0" * 64, name, "1" * 64)) for name in ("a.py", "b.py")]
    controller = cast("Controller", SimpleNamespace(runtime=runtime))
    away = stream_files(controller, dict.fromkeys(("away-1", "away-2", "here", "late"), files), "code")
    events.close()
    assert away == {"away-1": "away-1 is not connected", "away-2": "away-2 is not connected"}
    assert attempts[:4] == ["away-1 a.py", "away-2 a.py", "here a.py", "here b.py"]
    assert attempts.count("late b.py") == 1
    # in turn, not one after the other: as often the one as the other
    assert attempts.count("away-1 a.py") == attempts.count("away-2 a.py") > 2
