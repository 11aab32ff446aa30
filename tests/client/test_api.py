"""The functions that a script calls, with a site's end that the tests hold in their hands."""

from __future__ import annotations

import enum
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedbio.client as flare
from fedbio.client.host import Answered, Event, QueueHost, SocketHost, Taken
from fedbio.client.launch import RunningThread
from fedbio.errors import SettingsError
from fedbio.federation import FLModel as Travelling
from fedbio.federation import Task
from fedbio.settings_jobs import ModelSelection

from .conftest import wait_until

Script = Callable[[], Any]


class Site:
    """Gives tasks to a function that runs as a script in this process, and keeps what comes back."""

    def __init__(self, folder: Path) -> None:
        self.events: list[Event] = []
        self.metrics: list[tuple[Any, ...]] = []
        about = {"site_name": "site-1", "job_id": "job-1"}
        self.host = QueueHost(about, self.events.append, lambda *metric: self.metrics.append(metric))
        self.log = folder / "script.log"
        self.ended = threading.Event()

    def run(self, script: Script) -> None:
        self.thread = RunningThread(script, self.host.link, "numpy", self.log, lambda _: self.ended.set())

    def give(self, name: str = "train", **model: Any) -> None:
        self.host.give(Task(name=f"client/{name}", model=Travelling(**model), id=str(len(self.events))))

    def finish(self) -> list[Travelling]:
        """Say that there is no more, wait for the script's end, and return its answers."""
        self.host.say_end()
        assert self.ended.wait(20)
        assert not self.log.exists(), self.log.read_text()
        return [event.result.model for event in self.events if isinstance(event, Answered)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    found.host.close()


PARAMS = {"w": np.arange(3.0)}


def test_model_is_the_same_until_it_is_answered(site: Site) -> None:
    def script() -> None:
        flare.init()
        assert flare.is_running()
        assert flare.is_running()
        first = flare.receive()
        assert flare.receive() is first
        assert flare.get_task_name() == "train"
        assert flare.is_train()
        assert not flare.is_evaluate()
        flare.send(flare.FLModel(params={"w": first.params["w"] + 1}))
        second = flare.receive()
        assert second is not first
        assert second.current_round == 1
        flare.send(flare.FLModel(metrics={"loss": 1}))
        assert not flare.is_running()
        assert flare.receive() is None

    site.give(params=PARAMS)
    site.give(params=PARAMS, current_round=1)
    site.run(script)
    first, second = site.finish()
    assert first.params["w"].tolist() == [1, 2, 3]
    assert (second.params, second.metrics, second.current_round) == ({}, {"loss": 1.0}, 1)
    assert sum(isinstance(event, Taken) for event in site.events) == 2


def test_receive_waits_no_longer_than_it_is_told(site: Site) -> None:
    def script() -> None:
        flare.init()
        assert flare.receive(timeout=0.05) is None
        ready.set()
        assert flare.receive(timeout=20) is not None
        flare.send(flare.FLModel(metrics={"loss": 1}))

    ready = threading.Event()
    site.run(script)
    assert ready.wait(10)
    site.give(params=PARAMS)
    assert len(site.finish()) == 1


def test_answered_parameters_are_let_go_unless_they_shall_stay(site: Site) -> None:
    def script() -> None:
        flare.init()
        for clear in (True, False):
            flare.receive()
            answer = flare.FLModel(params={"w": np.ones(1)})
            flare.send(answer, clear_cache=clear)
            assert (answer.params is None) is clear

    site.give(params=PARAMS)
    site.give(params=PARAMS)
    site.run(script)
    assert len(site.finish()) == 2


def test_answer_is_a_copy_that_the_script_no_longer_changes(site: Site) -> None:
    def script() -> None:
        flare.init()
        flare.receive()
        mine = np.ones(2)
        flare.send(flare.FLModel(params={"w": mine}))
        mine += 1

    site.give(params=PARAMS)
    site.run(script)
    assert site.finish()[0].params["w"].tolist() == [1, 1]


def test_wrong_order_of_calls_is_explained(site: Site) -> None:
    def script() -> None:
        flare.init()
        flare.init()  # only a remark in the log
        with pytest.raises(RuntimeError, match="no model has come yet"):
            flare.get_task_name()
        with pytest.raises(RuntimeError, match=r"call receive\(\) before each send\(\)"):
            flare.send(flare.FLModel(metrics={"loss": 1}))
        flare.receive()
        with pytest.raises(TypeError, match="takes an FLModel, not a dict"):
            flare.send({"w": 1})  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="neither params nor metrics"):
            flare.send(flare.FLModel())
        flare.send(flare.FLModel(metrics={"loss": 1}))
        with pytest.raises(RuntimeError, match=r"call receive\(\) before each send\(\)"):
            flare.send(flare.FLModel(metrics={"loss": 1}))

    site.give(params=PARAMS)
    site.run(script)
    assert len(site.finish()) == 1


def test_decorated_functions_get_the_model_and_send_what_they_return(site: Site) -> None:
    def script() -> None:
        flare.init()
        while flare.is_running():
            assert measure(scale=2.0) == {"accuracy": 0.5}
            if flare.is_train():
                train(None, 10)

    @flare.train
    def train(model: flare.FLModel, step: int, *, more: int = 1) -> flare.FLModel:
        return flare.FLModel(params={"w": model.params["w"] + step * more})

    @flare.evaluate()
    def measure(model: Any = None, scale: float = 1.0) -> dict[str, float]:
        return {"accuracy": model.params["w"][1] / scale}

    site.give("train", params=PARAMS)
    site.give("evaluate", params=PARAMS)
    site.run(script)
    trained, measured = site.finish()
    assert trained.params["w"].tolist() == [10, 11, 12]
    assert trained.metrics == {"accuracy": 0.5}
    assert (measured.params, measured.metrics) == ({}, {"accuracy": 0.5})


def test_loop_that_evaluates_and_trains_in_each_turn_answers_each_task_once(site: Site) -> None:
    done: list[Any] = []

    def script() -> None:
        flare.init()
        while flare.is_running():
            model = flare.receive()
            done.append((flare.get_task_name(), measure(model), train(model, 10) is None))

    @flare.train
    def train(model: flare.FLModel, step: int) -> flare.FLModel:
        return flare.FLModel(params={"w": model.params["w"] + step})

    @flare.evaluate
    def measure(model: flare.FLModel) -> float:
        return float(model.params["w"][1])

    tasks = ["train", "evaluate", "train", "evaluate", "evaluate"]
    for number, task in enumerate(tasks):
        site.give(task, params={"w": np.full(2, number)})
    site.run(script)
    answers = site.finish()
    assert done == [(task, number, task == "evaluate") for number, task in enumerate(tasks)]
    assert [each.metrics for each in answers] == [{"accuracy": number} for number in range(5)]
    assert [each.params["w"].tolist() if each.params else None for each in answers] == [
        [10, 10],
        None,
        [12, 12],
        None,
        None,
    ]


def test_functions_without_a_loop_wait_for_their_next_model(site: Site) -> None:
    def script() -> None:
        flare.init()
        assert measure() == {"loss": 1}
        assert train() is None
        assert train().metrics == {"loss": 2}

    @flare.train
    def train(model: Any = None) -> flare.FLModel:
        return flare.FLModel(metrics={"loss": 2})

    @flare.evaluate
    def measure(model: Any = None) -> dict[str, float]:
        return {"loss": 1}

    site.give("evaluate", params=PARAMS)
    site.give("train", params=PARAMS)
    site.run(script)
    assert [each.metrics for each in site.finish()] == [{"loss": 1}, {"loss": 2}]


def test_metrics_go_with_no_other_model_than_the_one_that_was_measured(site: Site) -> None:
    def script() -> None:
        flare.init()
        measure()
        flare.send(flare.FLModel(params=PARAMS))
        train()

    @flare.train
    def train(model: Any = None) -> flare.FLModel:
        return flare.FLModel(params=model.params)

    @flare.evaluate
    def measure(model: Any = None) -> float:
        return 0.5

    for _ in range(2):
        site.give("train", params=PARAMS)
    site.run(script)
    assert [each.metrics for each in site.finish()] == [{}, {}]


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_single_number_is_the_metric_that_chooses_the_best_model(site: Site, number: Any) -> None:
    def script() -> None:
        flare.init()
        assert measure() is number

    @flare.evaluate
    def measure(model: Any = None) -> Any:
        return number

    site.give("evaluate", params=PARAMS)
    site.run(script)
    (answer,) = site.finish()
    assert answer.metrics == {ModelSelection().metric: 0.5}


@pytest.mark.parametrize("found", [None, "0.5", [0.5], np.array([0.5]), torch.tensor([0.5])])
def test_what_is_no_number_is_no_metric(site: Site, found: Any) -> None:
    def script() -> None:
        flare.init()
        with pytest.raises(TypeError, match=r"measure returned \w+; @evaluate needs a number or a dict of metrics"):
            measure()

    @flare.evaluate
    def measure(model: Any = None) -> Any:
        return found

    site.give("evaluate", params=PARAMS)
    site.run(script)
    assert site.finish() == []


def test_logged_values_come_with_step_and_type(site: Site) -> None:
    class Kind(enum.Enum):
        SCALAR = "SCALAR"

    def script() -> None:
        flare.init()
        flare.log("loss", np.float64(0.5), Kind.SCALAR, global_step=7)
        flare.log("loss", 1, step=8)
        flare.log("rates", {"a": 1}, "SCALARS")
        flare.log("note", "text", "TEXT")
        with pytest.raises(TypeError, match=r"log\('x'\): a list is neither a number nor a text"):
            flare.log("x", [1, 2])

    site.run(script)
    site.finish()
    assert site.metrics == [
        ("loss", 0.5, 7, "SCALAR"),
        ("loss", 1.0, 8, "SCALAR"),
        ("rates", {"a": 1.0}, None, "SCALARS"),
        ("note", "text", None, "TEXT"),
    ]


def test_threads_of_the_script_share_its_session(site: Site) -> None:
    def script() -> None:
        flare.init()
        thread = threading.Thread(target=lambda: names.append(flare.get_site_name()))
        thread.start()
        thread.join()

    names: list[str] = []
    site.run(script)
    site.finish()
    assert names == ["site-1"]


def test_shutdown_is_the_end(site: Site) -> None:
    def script() -> None:
        flare.init()
        flare.receive()
        flare.shutdown()
        assert not flare.is_running()
        assert flare.receive() is None

    site.give(params=PARAMS)
    site.run(script)
    assert site.finish() == []


def test_functions_before_init_say_so() -> None:
    with pytest.raises(RuntimeError, match=r"call init\(\) before"):
        flare.is_running()


def test_script_that_is_run_by_hand_is_told_how_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDBIO_SOCKET", raising=False)
    with pytest.raises(SettingsError, match="fedbio server --jobs"):
        flare.init()


def test_socket_is_open_to_nobody_else_and_gone_afterwards(tmp_path: Path) -> None:
    host = SocketHost({}, lambda event: None, lambda *metric: None, tmp_path / "spool")
    socket = Path(host.environment["FEDBIO_SOCKET"])
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert socket.is_socket()
    host.close()
    host.close()
    assert not socket.parent.exists()


CLIENT = """
import fedbio.client as flare
flare.init()
model = flare.receive()
print(model.params["w"].tolist(), flush=True)
flare.send(flare.FLModel(params=model.params))
print(flare.is_running())
"""


def test_site_that_closes_is_the_end_of_the_federation(tmp_path: Path) -> None:
    events: list[Event] = []
    host = SocketHost({"site_name": "a", "job_id": "b"}, events.append, lambda *_: None, tmp_path / "spool")
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT], env={**os.environ, **host.environment}, stdout=subprocess.PIPE, text=True
    )
    host.give(Task(name="client/train", model=Travelling(params=PARAMS), id="7"))
    wait_until(lambda: any(isinstance(event, Answered) for event in events))
    host.close()
    output, _ = process.communicate(timeout=20)
    assert output.splitlines() == ["[0.0, 1.0, 2.0]", "False"]
    assert process.returncode == 0
