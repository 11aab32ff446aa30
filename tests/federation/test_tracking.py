"""Live metrics: from a task to the server's file and its trackers, past what a hostile site might send."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedbio.errors import PeerUnreachable, ProtocolError, SettingsError
from fedbio.federation import FLModel, SiteContext, messages, tracking
from fedbio.federation.messages import MAX_STEP, METRICS_IN_MESSAGE, Metric, Metrics, unpack
from fedbio.federation.reporter import WAITING, Reporter, plain_key
from fedbio.federation.trackers import MLflow, TensorBoard, WandB, chosen
from fedbio.federation.tracking import TRACKING_FILE, Tracking
from fedbio.results import EventLog


def lines_of(path: Path) -> list[dict[str, Any]]:
    # the last line may be half written while a server runs
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder / "events.jsonl") if line["event"] == name]


class Instrumented:
    """Sites of the fixture's federation whose training tells the server what it does."""

    def __init__(self, federation: Any, train: Any, **settings: Any) -> None:
        self.federation, self.sites = federation, []
        jobs = federation.jobs(rounds=2)
        self.server = federation.server(jobs.model_copy(update=settings))
        self.running = [federation.start(self.server)]
        for name in ("site-1", "site-2", "site-3"):
            executors = federation.fakes()
            plain = executors["train"].answer

            def answer(model: FLModel, context: SiteContext, plain: Any = plain) -> FLModel:
                train(self, model, context)
                return plain(model, context)

            executors["train"].answer = answer
            site = federation.site(name, executors)
            self.sites.append(site)
            self.running.append(federation.start(site))

    def end(self) -> None:
        for each in self.running:
            each.result(60)


def test_metrics_are_at_the_server_while_the_task_is_still_done(federation: Any) -> None:
    file = federation.folder / "server" / TRACKING_FILE
    seen = []

    def train(run: Instrumented, model: FLModel, context: SiteContext) -> None:
        context.track("train/loss", 0.5, step=model.current_round)
        # the answer leaves only after this
        mine = {"site": context.site, "step": model.current_round}
        wait_until(lambda: any(mine.items() <= each.items() for each in lines_of(file)))
        seen.append((context.site, model.current_round))

    Instrumented(federation, train).end()
    assert len(seen) == 6
    found = {(each["site"], each["job"], each["key"], each["value"], each["step"]) for each in lines_of(file)}
    assert found == {(site, "classify", "train/loss", 0.5, number) for site, number in seen}
    left = json.loads((federation.folder / "site-1" / "party.json").read_text())["sent"]["metrics"]
    sent = [each for each in events_of(federation.folder / "site-1", "sent") if each.get("topic") == "metric"]
    assert len(sent) == 2
    assert left["bytes"] >= sum(each["bytes"] for each in sent) > 0


def test_metrics_of_a_task_are_in_tensorboard_when_its_job_is_done(federation: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(run: Instrumented, model: FLModel, context: SiteContext) -> None:
        for batch in range(5):
            context.track("train/loss", batch / 2 + int(context.site[-1]), step=10 * model.current_round + batch)

    Instrumented(federation, train, tracking=["tensorboard"]).end()
    for number in (1, 2, 3):
        found = EventAccumulator(str(federation.folder / "server" / "tensorboard" / "classify" / f"site-{number}"))
        found.Reload()
        points = [(each.step, each.value) for each in found.Scalars("train/loss")]
        begin = points[0][0]
        assert points == [(begin + 10 * turn + batch, batch / 2 + number) for turn in (0, 1) for batch in range(5)]
    told = EventAccumulator(str(federation.folder / "server" / "tensorboard" / "classify" / "server"))
    told.Reload()
    settings = json.loads(told.Tensors("settings")[0].tensor_proto.string_val[0])
    assert settings["training"]["rounds"] == 2


@pytest.mark.slow
def test_all_trackers_at_once_are_fed_while_a_job_runs(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    def train(run: Instrumented, model: FLModel, context: SiteContext) -> None:
        context.track("loss", 0.5, step=model.current_round)

    Instrumented(federation, train, tracking=["wandb", "mlflow", "tensorboard"]).end()
    server = federation.folder / "server"
    assert events_of(server, "tracker given up") == []
    rounds = [each["step"] for each in lines_of(server / TRACKING_FILE) if each["site"] == "site-2"]
    points = mlflow_points(server, "test/classify")
    names = ("site-1", "site-2", "site-3")
    # the server's own run has the job's settings, and no numbers
    assert points == {**{site: [(step, 0.5) for step in rounds] for site in names}, "server": []}
    rows = {**{site: [("loss", 0.5, step) for step in rounds] for site in names}, "server": []}
    # its own process may close its files a little later
    wait_until(lambda: wandb_runs(server) == rows)
    assert {each.name for each in (server / "tensorboard/classify").iterdir()} == {"server", *names}


def raw(*entries: Any, **fields: Any) -> bytes:
    keys = ("job", "key", "value", "step")
    return msgspec.msgpack.encode({"entries": [dict(zip(keys, entry, strict=False)) for entry in entries], **fields})


HOSTILE = {
    "no message": b"\xff\xff",
    "a job that is not there": raw(("other", "loss", 1.0)),
    "not a number": raw(("classify", "loss", float("nan"))),
    "infinite": raw(("classify", "loss", float("-inf"))),
    "text": raw(("classify", "loss", "MKTAYIAK")),
    "a way up": raw(("classify", "../../etc/passwd", 1.0)),
    "a way up in the middle": raw(("classify", "a/../b", 1.0)),
    "an absolute path": raw(("classify", "/etc", 1.0)),
    "a line break": raw(("classify", "loss\n", 1.0)),
    "an empty key": raw(("classify", "", 1.0)),
    "a long key": raw(("classify", "k" * 201, 1.0)),
    "a negative step": raw(("classify", "loss", 1.0, -1)),
    "a step beyond all bounds": raw(("classify", "loss", 1.0, MAX_STEP + 1)),
    "too many": raw(*[("classify", "loss", 1.0)] * (METRICS_IN_MESSAGE + 1)),
}


def test_what_a_hostile_site_sends_costs_it_these_metrics_and_nobody_else_anything(federation: Any) -> None:
    def train(run: Instrumented, model: FLModel, context: SiteContext) -> None:
        if context.site == "site-1":
            for body in HOSTILE.values():
                run.sites[0]._send(messages.METRIC, body, None, "metrics", 10.0)
        context.track("accuracy", 0.25, step=7)

    Instrumented(federation, train, tracking=[]).end()
    found = lines_of(federation.folder / "server" / TRACKING_FILE)
    assert sorted((each["site"], each["key"], each["value"], each["step"]) for each in found) == [
        (f"site-{number}", "accuracy", 0.25, 7) for number in (1, 1, 2, 2, 3, 3)
    ]
    told = events_of(federation.folder / "server", "metrics refused")
    assert len(told) == tracking.TOLD
    assert {each["site"] for each in told} == {"site-1"}
    (total,) = events_of(federation.folder / "server", "metrics refused in all")
    assert (total["site"], total["count"]) == ("site-1", 2 * len(HOSTILE))


@pytest.fixture
def server_end(tmp_path: Path) -> Iterator[Any]:
    events = EventLog(tmp_path, "server")

    def make(*names: Any) -> Tracking:
        return Tracking(
            tmp_path,
            names,
            federation="test",
            server="server",
            events=events,
            sites=("site-1", "site-2"),
            jobs=lambda: {"job", "classify"},
        )

    yield make
    events.close()


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_each_hostile_message_is_refused_with_a_reason(server_end: Any, tmp_path: Path, body: bytes) -> None:
    end = server_end()
    end.take("site-1", body)
    end.close()
    (told,) = events_of(tmp_path, "metrics refused")
    assert told["reason"]
    assert lines_of(tmp_path / TRACKING_FILE) == []


def test_bounds_on_keys_points_and_rate_hold_for_each_site(
    server_end: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "KEYS", 2)
    monkeypatch.setattr(tracking, "POINTS", 5)
    end = server_end()
    end.take("site-1", raw(("job", "a", 1.0), ("job", "b", 1.0), ("job", "c", 1.0), ("job", "a", 2.0)))
    end.take("site-1", raw(*[("job", "a", 3.0)] * 5))
    end.take("site-2", raw(("job", "c", 1.0)))
    end.take("site-9", raw(("job", "c", 1.0)))
    end.close()
    kept = [(each["site"], each["key"], each["value"]) for each in lines_of(tmp_path / TRACKING_FILE)]
    assert kept == [
        *[("site-1", "a", 1.0), ("site-1", "b", 1.0), ("site-1", "a", 2.0)],
        *[("site-1", "a", 3.0)] * 2,
        ("site-2", "c", 1.0),
    ]
    reasons = [(each["site"], each["count"], each["reason"]) for each in events_of(tmp_path, "metrics refused")]
    assert reasons == [
        ("site-1", 1, "c would be key 3 of job job"),
        ("site-1", 3, "job job has 5 metrics of it already"),
        ("site-9", 1, "it is not expected"),
    ]


def test_a_site_that_floods_is_cut_to_its_rate(
    server_end: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "BURST", 3.0)
    monkeypatch.setattr(tracking, "RATE", 0.0)
    end = server_end()
    end._accounts["site-1"].credit = 3.0
    end.take("site-1", raw(*[("job", "a", 1.0)] * 10))
    end.close()
    assert len(lines_of(tmp_path / TRACKING_FILE)) == 3
    (told,) = events_of(tmp_path, "metrics refused")
    assert told["count"] == 7


def test_a_line_that_a_kill_has_cut_off_spoils_no_other(server_end: Any, tmp_path: Path) -> None:
    (tmp_path / TRACKING_FILE).write_text('{"key": "whole"}\n{"key": "cut o')
    for _ in range(2):
        end = server_end()
        end.take("site-1", raw(("job", "loss", 1.0)))
        end.close()
    lines = (tmp_path / TRACKING_FILE).read_text().splitlines()
    assert [json.loads(line)["key"] for line in (lines[0], *lines[2:])] == ["whole", "loss", "loss"]


@pytest.mark.slow
def test_a_tracker_that_fails_is_given_up_and_the_others_go_on(server_end: Any, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way of the folder")
    end = server_end("tensorboard", "mlflow")
    end.take("site-1", raw(("job", "loss", 1.0, 3)))
    end.close()
    (told,) = events_of(tmp_path, "tracker given up")
    assert told["tracker"] == "tensorboard"
    assert mlflow_points(tmp_path) == {"site-1": [(3, 1.0)]}
    assert len(lines_of(tmp_path / TRACKING_FILE)) == 1


def mlflow_points(workspace: Path, name: str = "test/job") -> dict[str, list[tuple[int, float]]]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workspace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    return {
        run.info.run_name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")]
        for run in client.search_runs([experiment.experiment_id])
    }


def test_mlflow_has_a_run_for_each_site_and_goes_on_with_it_after_a_restart(tmp_path: Path) -> None:
    import mlflow

    killed = MLflow(tmp_path, "test")
    for step in range(3):
        killed.scalar("site-1", "job", "loss", step / 4, step)
        killed.scalar("site-2", "job", "loss", 1.0, step)
    killed.flush()
    # a server that is killed ends no run
    again = MLflow(tmp_path, "test")
    again.text("site-1", "job", "settings", '{"rounds": 3}', 0)
    again.scalar("site-1", "job", "loss", 0.75, 3)
    again.close()
    expected = {"site-1": [(step, step / 4) for step in range(4)], "site-2": [(step, 1.0) for step in range(3)]}
    assert mlflow_points(tmp_path) == expected
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("test/job").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert by_name["site-1"].data.tags["settings"] == '{"rounds": 3}'
    assert by_name["site-1"].info.status == "FINISHED"


def test_tensorboard_reads_one_curve_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for process, step in ((1, 0), (2, 1)):
        # the second process of a server has another id
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        tracker = TensorBoard(tmp_path, "test")
        tracker.scalar("site-1", "job", "loss", float(step), step)
        tracker.flush()
    folder = tmp_path / "tensorboard" / "job" / "site-1"
    assert len(list(folder.iterdir())) == 2
    found = EventAccumulator(str(folder)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [(0, 0.0), (1, 1.0)]


def test_wandb_offline_keeps_every_point_of_every_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WandB(tmp_path, "test")
    # steps that go back: two keys of one script
    points = [("loss", 0.5, 1), ("loss", 0.25, 2), ("accuracy", 0.75, 1)]
    for site in ("site-1", "site-2"):
        for key, value, step in points:
            tracker.scalar(site, "job", key, value, step)
    tracker.text("site-1", "job", "settings", "{}", 0)
    tracker.close()
    wait_until(lambda: wandb_runs(tmp_path) == dict.fromkeys(("site-1", "site-2"), points))


def wandb_runs(workspace: Path) -> dict[str, list[tuple[str, float, int]]]:
    return dict(map(wandb_rows, workspace.glob("wandb/offline-run-*/run-*.wandb")))


def wandb_rows(path: Path) -> tuple[str, list[tuple[str, float, int]]]:
    """Return a run's name and its rows, from the log that `wandb sync` reads."""
    from wandb.proto import wandb_internal_pb2

    name, rows = "", []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            name = record.run.display_name
        elif record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            (key,) = {"loss", "accuracy"} & set(row)
            rows.append((key, row[key], row["step"]))
    return name, rows


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield what a log in LevelDB's format holds; W&B's begins with seven bytes of its own."""
    assert content[:4] in (b":W&B", b"")
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        if at + 7 > len(content):
            return
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            return  # it is being written
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 is a whole record, 4 the last part of one
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow
def test_no_tracker_brings_torch_into_the_server(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedbio.federation.trackers import open_tracker\n"
        "for name in ('tensorboard', 'mlflow', 'wandb'):\n"
        "    tracker = open_tracker(name, Path(sys.argv[1]), 'test')\n"
        "    tracker.scalar('site-1', 'job', 'loss', 1.0, 0); tracker.flush(); tracker.close()\n"
        "print([name for name in ('torch', 'tensorflow') if name in sys.modules])\n"
    )
    environment = {"PATH": "", "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stderr


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen(None) == ()
    with pytest.raises(SettingsError, match=r"mlflow is not installed on the server; `pip install 'fedbio\[mlflow\]'`"):
        chosen(["mlflow"])


# the site's end


class Line:
    """What a reporter sends, until it is cut."""

    def __init__(self) -> None:
        self.got: list[Metrics] = []
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def __call__(self, body: bytes) -> None:
        self.open.wait(20)
        if self.error is not None:
            raise self.error
        self.got.append(unpack(Metrics, body))

    @property
    def entries(self) -> list[Metric]:
        return [entry for each in self.got for entry in each.entries]


def test_a_script_faster_than_its_line_is_not_held_up_and_learns_what_was_left_out() -> None:
    line = Line()
    line.open.clear()
    reporter = Reporter(line)
    count = 3 * WAITING
    for step in range(count):
        reporter.add("job", "loss", 1.0, step)
    line.open.set()
    reporter.close()
    steps = [each.step for each in line.entries]
    assert steps == sorted(steps)
    assert steps[-1] == count - 1
    assert len(steps) + sum(each.left_out for each in line.got) == count
    # what waited, and at most one message that was under way
    assert len(line.got) <= WAITING // METRICS_IN_MESSAGE + 1


def test_a_break_of_the_line_loses_nothing_and_keeps_the_order() -> None:
    line = Line()
    line.error = PeerUnreachable("gone")
    reporter = Reporter(line)
    for step in range(300):
        reporter.add("job", "loss", 1.0, step)
    reporter.flush()
    assert line.got == []
    line.error = None
    for step in range(300, 310):
        reporter.add("job", "loss", 1.0, step)
    reporter.close()
    assert [each.step for each in line.entries] == list(range(310))
    assert all(each.left_out == 0 for each in line.got)


def test_what_the_server_does_not_accept_is_not_sent_again() -> None:
    line = Line()
    line.error = ProtocolError("refused")
    reporter = Reporter(line)
    reporter.add("job", "loss", 1.0)
    reporter.flush()
    line.error = None
    reporter.close()
    assert line.got == []


def test_only_finite_numbers_leave_a_site(caplog: pytest.LogCaptureFixture) -> None:
    line = Line()
    reporter = Reporter(line)
    for value in (float("nan"), float("inf"), 0.5, float("nan")):
        reporter.add("job", "loss", value, -3)
    reporter.close()
    assert [(each.value, each.step) for each in line.entries] == [(0.5, 0)]
    assert [record.message for record in caplog.records] == [
        "metric not sent key=loss value=nan: only finite numbers travel"
    ]


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("val_loss/epoch 1", "val_loss/epoch 1"),
        ("loss (train)", "loss _train_"),
        ("../../x", "x"),
        ("a//b/./c", "a/b/c"),
        ("", "_"),
        ("größe", "gr__e"),
        ("k" * 300, "k" * 200),
        ("/", "_"),
    ],
)
def test_any_key_of_a_script_becomes_one_that_the_server_takes(key: str, plain: str) -> None:
    assert plain_key(key) == plain
    assert unpack(Metrics, messages.pack(Metrics([Metric("job", plain_key(key), 1.0)]))).entries[0].key == plain
