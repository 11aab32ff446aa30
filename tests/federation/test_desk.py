"""Answers that may not count, and tasks that are pushed again."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import FederationError, PeerUnreachable, TransportError
from fedbio.federation import FLModel, Result, Task
from fedbio.federation.acceptance import ANY_TENSORS, Expectation
from fedbio.federation.desk import Desk
from fedbio.federation.messages import Join
from fedbio.federation.model import Status, decode
from fedbio.results import EventLog
from fedbio.transport import MemorySink, ServerEndpoint, SiteEndpoint, Unencrypted

ANYTHING = Expectation()


class Mail:
    """Stands for the transport: notes what is sent, and answers if told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self.arrived = threading.Condition()

    def post(self, site: str, body: bytes, payload: Any) -> None:
        with self.arrived:
            self.sent.append((site, decode(Task, body, {}).id))
            self.arrived.notify_all()
        if site in self.broken:
            raise PeerUnreachable(f"{site} is not connected")

    def wait_for(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.sent) >= count, 10)


@pytest.fixture
def mail() -> Mail:
    return Mail()


@pytest.fixture
def desk(tmp_path: Path, mail: Mail) -> Iterator[Desk]:
    events = EventLog(tmp_path, "server")
    made = Desk(["site-1", "site-2"], mail.post, events)
    yield made
    made.close()
    events.close()


def ask(desk: Desk, task: Task, sites: list[str], **options: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    options = {"expected": ANYTHING, "min_responses": len(sites), "deadline_s": 10.0, **options}

    def run() -> None:
        try:
            found.append(desk.ask(task, sites, **options))
        except FederationError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def reasons(tmp_path: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return [(each["site"], each["reason"]) for each in lines if each["event"] == "result refused"]


def test_results_are_sorted_by_site_whatever_their_order(desk: Desk, mail: Mail) -> None:
    for site in desk.expected:
        desk.joined(site, Join(version="0"))
    thread, found = ask(desk, Task(name="train", model=FLModel(), id="1"), ["site-1", "site-2"])
    mail.wait_for(2)
    desk.answered(Result(task="1", site="site-2"))
    desk.answered(Result(task="1", site="site-1"))
    thread.join(10)
    assert [each.site for each in found[0]] == ["site-1", "site-2"]


def test_answers_unasked_twice_or_late_are_refused(desk: Desk, mail: Mail, tmp_path: Path) -> None:
    for site in desk.expected:
        desk.joined(site, Join(version="0"))
    thread, _ = ask(desk, Task(name="train", model=FLModel(), id="1"), ["site-1"])
    mail.wait_for(1)
    desk.answered(Result(task="1", site="site-2"))
    desk.answered(Result(task="other", site="site-1"))
    desk.answered(Result(task="1", site="site-1"))
    thread.join(10)
    desk.answered(Result(task="1", site="site-1"))
    assert reasons(tmp_path) == [
        ("site-2", "it was not asked"),
        ("site-1", "its task is not open"),
        ("site-1", "its task is not open"),
    ]


def test_events_of_answers_name_the_job_also_when_they_come_late(desk: Desk, mail: Mail, tmp_path: Path) -> None:
    for site in desk.expected:
        desk.joined(site, Join(version="0"))
    task = Task(name="train", model=FLModel(current_round=3), id="1", job="study")
    thread, _ = ask(desk, task, ["site-1", "site-2"], min_responses=0)
    mail.wait_for(2)
    desk.answered(Result(task="1", site="site-1"), size=7, digest=b"\1" * 32)
    desk.answered(Result(task="1", site="site-1"))
    desk.answered(Result(task="1", site="site-2", status=Status.FAILED, reason="no room"))
    thread.join(10)
    desk.answered(Result(task="1", site="site-2"))
    named = {"task": "train", "id": "1", "job": "study", "round": 3}
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    found = [
        each for each in lines if "refused" in each["event"] or each["event"] in ("result accepted", "task failed")
    ]
    assert [each["event"] for each in found] == ["result accepted", "result refused", "task failed", "result refused"]
    assert [{key: each[key] for key in named} for each in found] == [named] * 4
    assert (found[0]["bytes"], found[0]["digest"], found[0]["weight"]) == (7, "01" * 32, None)


def test_last_lines_of_a_script_are_in_the_event_and_not_in_the_jobs_error(
    desk: Desk, mail: Mail, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk.joined("site-1", Join(version="0"))
    thread, found = ask(desk, Task(name="train", model=FLModel(), id="1", job="study"), ["site-1"])
    mail.wait_for(1)
    lines = ("Traceback", "ValueError: no")
    desk.answered(Result(task="1", site="site-1", status=Status.FAILED, reason="it crashed", last_lines=lines))
    thread.join(10)
    # every site is told the error; only the server's own log has what one of them has printed
    assert "site-1: failed: it crashed" in str(found[0])
    assert "Traceback" not in str(found[0])
    assert "reason=it crashed\n  Traceback\n  ValueError: no" in caplog.text
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [each["last_lines"] for each in events if each["event"] == "task failed"] == [list(lines)]


def test_answer_has_room_for_what_its_task_asks_for(desk: Desk, mail: Mail) -> None:
    desk.joined("site-1", Join(version="0"))
    manifest = {"w": ((100, 3), np.dtype(np.float32)), "n": ((), np.dtype(np.int64))}
    tasks = [
        ask(desk, Task(name="train", model=FLModel(), id=name, job=name), ["site-1"], expected=expected)
        for name, expected in (("a", Expectation(manifest)), ("b", Expectation()), ("c", Expectation(ANY_TENSORS)))
    ]
    mail.wait_for(3)
    assert [desk.room("site-1", name) for name in "ab"] == [1208, 0]
    assert desk.room("site-1", "c") == desk.room("site-1") > 1 << 50
    assert [desk.room("site-1", "other"), desk.room("site-2", "a"), desk.room("site-2")] == [0, 0, 0]
    for name in "abc":
        desk.unreadable("site-1", "that is all", name)
    for thread, _ in tasks:
        thread.join(10)


def test_site_whose_results_are_refused_on_and_on_fills_no_disk(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedbio.federation.desk.REFUSALS_NOTED", 5)
    for site in ("site-1",) * 20 + ("site-2",):
        desk.answered(Result(task="other", site=site))
        desk.unreadable(site, "nonsense" * 10_000)
    assert max(len(reason) for _, reason in reasons(tmp_path)) < 3_000
    assert [site for site, _ in reasons(tmp_path)] == ["site-1"] * 5 + ["site-2"] * 2
    assert caplog.text.count("site-1") == 6
    assert "further refused results are not noted site=site-1 after=5" in caplog.text


def test_unreadable_answer_costs_its_site_that_task_and_no_other(desk: Desk, mail: Mail, tmp_path: Path) -> None:
    for site in desk.expected:
        desk.joined(site, Join(version="0"))
    threads = [ask(desk, Task(name="train", model=FLModel(), id=name, job=name), ["site-1"]) for name in "ab"]
    mail.wait_for(2)
    desk.unreadable("site-1", "no tensors", "a")
    desk.answered(Result(task="b", site="site-1"))
    for thread, _ in threads:
        thread.join(10)
    assert "its result was refused: no tensors" in str(threads[0][1][0])
    assert [each.site for each in threads[1][1][0]] == ["site-1"]
    # where nobody can say which task it was, the site loses what it has
    thread, found = ask(desk, Task(name="train", model=FLModel(), id="c", job="c"), ["site-1"])
    mail.wait_for(3)
    desk.unreadable("site-1", "no message")
    thread.join(10)
    assert "no message" in str(found[0])
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [each["job"] for each in lines if each["event"] == "result refused"] == ["a", "c"]


def test_second_answer_to_an_open_task_is_refused(desk: Desk, mail: Mail, tmp_path: Path) -> None:
    for site in desk.expected:
        desk.joined(site, Join(version="0"))
    thread, found = ask(desk, Task(name="train", model=FLModel(), id="1"), ["site-1", "site-2"])
    mail.wait_for(2)
    desk.answered(Result(task="1", site="site-1", model=FLModel(metrics={"loss": 1.0})))
    desk.answered(Result(task="1", site="site-1", model=FLModel(metrics={"loss": 9.0})))
    desk.answered(Result(task="1", site="site-2"))
    thread.join(10)
    assert found[0][0].model.metrics == {"loss": 1.0}
    assert reasons(tmp_path) == [("site-1", "it has answered already")]


def test_task_is_pushed_again_when_a_site_comes_back(desk: Desk, mail: Mail) -> None:
    desk.joined("site-1", Join(version="0"))
    mail.broken.add("site-1")
    thread, found = ask(desk, Task(name="train", model=FLModel(), id="1"), ["site-1"])
    mail.wait_for(1)
    desk.gone("site-1")
    mail.broken.clear()
    desk.joined("site-1", Join(version="0"))
    mail.wait_for(2)
    desk.answered(Result(task="1", site="site-1"))
    thread.join(10)
    assert found[0][0].site == "site-1"
    assert mail.sent == [("site-1", "1"), ("site-1", "1")]


def test_closed_task_is_sent_no_further(tmp_path: Path) -> None:
    """A site that takes the model in slowly does not hold up what comes after the round."""
    reading, opened, cancelled = threading.Event(), threading.Event(), threading.Event()

    class Slow(MemorySink):
        waits = True

        def write(self, chunk: memoryview) -> None:
            opened.set()
            reading.wait(20)
            super().write(chunk)

        def suspend(self) -> None:
            cancelled.set()
            super().suspend()

    name = Unencrypted("server"), Unencrypted("site-1")
    server = ServerEndpoint("127.0.0.1:0", name[0], spool=tmp_path, on_message=print, driver="memory")
    site = SiteEndpoint(
        server.address,
        name[1],
        spool=tmp_path,
        on_message=print,
        driver="memory",
        sinks={"task": lambda opening: Slow(opening.size)},
    )
    posted: list[BaseException] = []

    def post(to: str, body: bytes, payload: Any) -> None:
        try:
            server.send(to, "task", body, payload)
        except TransportError as error:
            posted.append(error)
            raise

    events = EventLog(tmp_path, "server")
    with server, site:
        desk = Desk(["site-1"], post, events)
        desk.joined("site-1", Join(version="0"))
        model = FLModel(params={"weight": np.zeros(5 << 20, np.float32)})
        thread, found = ask(desk, Task(name="train", model=model, job="study"), ["site-1"], deadline_s=20.0)
        assert opened.wait(10)
        desk.interrupt("study", FederationError("aborted"))
        thread.join(10)
        assert str(found[0]) == "aborted"
        desk.close()
        deadline = time.monotonic() + 10
        while not posted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "cancelled" in str(posted[0])
        reading.set()
        assert cancelled.wait(10)
    events.close()


def test_deadline_with_enough_results_goes_on_and_without_names_the_missing(desk: Desk, mail: Mail) -> None:
    for site in desk.expected:
        desk.joined(site, Join(version="0"))
    for least, expected in ((1, list), (2, FederationError)):
        task = Task(name="train", model=FLModel(), job="study")
        thread, found = ask(desk, task, ["site-1", "site-2"], min_responses=least, deadline_s=0.5)
        mail.wait_for(2 * least)
        desk.answered(Result(task=task.id, site="site-1"))
        thread.join(10)
        assert isinstance(found[0], expected)
    assert "1 of 2 sites have answered, 2 are needed; site-2: has not answered" in str(found[0])


def test_gone_site_is_named_with_the_time_that_it_is_gone(desk: Desk, mail: Mail) -> None:
    desk.joined("site-1", Join(version="0"))
    thread, found = ask(desk, Task(name="train", model=FLModel()), ["site-1"], deadline_s=0.5)
    mail.wait_for(1)
    desk.gone("site-1")
    thread.join(10)
    assert re.search(r"site-1: is gone since \d s", str(found[0]))


def test_result_whose_check_outlasts_its_task_is_refused(tmp_path: Path, desk: Desk, mail: Mail) -> None:
    checking, closed = threading.Event(), threading.Event()

    class Slow(Expectation):
        def problem(self, result: Result) -> str | None:
            checking.set()
            assert closed.wait(10)
            return None

    for site in desk.expected:
        desk.joined(site, Join(version="1"))
    task, shown = Task(name="train", model=FLModel()), list[Result]()

    def answer() -> None:
        mail.wait_for(1)
        desk.answered(Result(task=task.id, site="site-1"))

    late = threading.Thread(target=answer)
    late.start()
    results = desk.ask(task, ["site-1"], Slow(), min_responses=0, deadline_s=0.5, on_result=shown.append)
    assert checking.is_set()
    closed.set()
    late.join()
    assert results == []
    assert shown == []
    assert reasons(tmp_path) == [("site-1", "its task is not open")]
