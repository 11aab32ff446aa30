"""Jobs of a running server: their queue, what administrators may do, what sites refuse, and hostile submissions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedbio import settings
from fedbio.errors import (
    FedbioError,
    FederationError,
    InputError,
    ProtocolError,
    RefusedError,
    SettingsError,
    TransportError,
)
from fedbio.federation import FLModel
from fedbio.federation import admin_messages as words
from fedbio.federation.admin_client import AdminClient
from fedbio.federation.job_files import check_job_files
from fedbio.federation.jobs import JobEntry, JobQueue, JobState
from fedbio.federation.messages import pack, unpack
from fedbio.federation.policy import Policy
from fedbio.federation.state import State
from fedbio.job_templates import TEMPLATES, template
from fedbio.settings import JobsFile
from fedbio.tensors import open_file
from fedbio.transport import BytesPayload, Received, SiteEndpoint

SITES = ("site-1", "site-2", "site-3")


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [each for each in found if each["event"] in names]


def named(federation: Any, *names: str, **options: Any) -> JobsFile:
    """One small study under each name."""
    made = federation.jobs(**options)
    return made.model_copy(update={"jobs": [made.jobs[0].model_copy(update={"name": name}) for name in names]})


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# the queue by itself


@dataclass
class Work:
    """Runs jobs that wait until they are let go."""

    begun: list[str] = field(default_factory=list)
    most: int = 0
    free: threading.Event = field(default_factory=threading.Event)
    fails: tuple[str, ...] = ()
    over: list[tuple[str, str, str]] = field(default_factory=list)
    interrupted: dict[str, FedbioError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._now = 0
        self._lock = threading.Lock()

    def run(self, entry: JobEntry) -> None:
        with self._lock:
            self.begun.append(entry.name)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            while not self.free.wait(0.01):
                if entry.name in self.interrupted:
                    raise self.interrupted[entry.name]
            if entry.name in self.fails:
                raise FederationError(f"{entry.name} cannot")
        finally:
            with self._lock:
                self._now -= 1

    def queue(self, folder: Path, **options: Any) -> JobQueue:
        return JobQueue(
            State(folder),
            run=self.run,
            interrupt=self.interrupted.__setitem__,
            note=lambda *end: None,
            over=lambda *end: self.over.append((end[0], str(end[1]), end[2])),
            folder=folder / "jobs",
            **options,
        )


def statistics(*names: str) -> JobsFile:
    return JobsFile.model_validate({"jobs": [{"workflow": "statistics", "name": name} for name in names]})


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (2, 2), (5, 3)])
def test_so_many_jobs_run_at_once_in_the_order_in_which_they_came(at_once: int, most: int, tmp_path: Path) -> None:
    work = Work()
    queue = work.queue(tmp_path, at_once=at_once)
    queue.offer(statistics("a", "b", "c"), tmp_path)
    running = threading.Thread(target=queue.work)
    running.start()
    wait_until(lambda: len(work.begun) == most)
    assert [row.state for row in State(tmp_path).jobs()] == ["running"] * most + ["waiting"] * (3 - most)
    work.free.set()
    running.join(10)
    assert work.most == most
    assert sorted(work.over) == [("a", "done", ""), ("b", "done", ""), ("c", "done", "")]
    if at_once == 1:
        assert work.begun == ["a", "b", "c"]


def test_failure_ends_a_server_with_a_plain_file_and_waits_for_the_next_one(tmp_path: Path) -> None:
    work = Work(fails=("a",))
    work.free.set()
    queue = work.queue(tmp_path)
    queue.offer(statistics("a", "b"), tmp_path)
    with pytest.raises(FederationError, match="a cannot"):
        queue.work()
    assert [(row.name, row.state, row.reason) for row in State(tmp_path).jobs()] == [
        ("a", "failed", "a cannot"),
        ("b", "waiting", ""),
    ]
    again = Work()
    again.free.set()
    queue = again.queue(tmp_path)
    queue.offer(statistics("a", "b"), tmp_path)
    queue.work()
    assert again.begun == ["a", "b"]


def test_failure_ends_only_its_job_where_the_server_goes_on_serving(tmp_path: Path) -> None:
    work = Work(fails=("a",))
    work.free.set()
    queue = work.queue(tmp_path)
    queue.offer(statistics("a", "b"), tmp_path)

    def more() -> None:
        if len(work.over) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.work(more=more)
    assert work.over == [("a", "failed", "a cannot"), ("b", "done", "")]


def test_what_waited_or_ran_when_the_server_was_killed_goes_on(tmp_path: Path) -> None:
    state = State(tmp_path)
    queue = Work().queue(tmp_path)
    queue.submit(statistics("ran", "waited", "is-done", "was-ended"))
    state.move("ran", "running")
    state.move("is-done", "done")
    state.move("was-ended", "aborted", "by hand")
    work = Work()
    work.free.set()
    # not closed: as after kill -9
    after = work.queue(tmp_path)
    after.restore()
    after.work()
    assert work.begun == ["ran", "waited"]
    assert {row.name: row.state for row in state.jobs()} == {
        "ran": "done",
        "waited": "done",
        "is-done": "done",
        "was-ended": "aborted",
    }


def test_jobs_that_run_when_the_server_is_stopped_are_not_failed(tmp_path: Path) -> None:
    work = Work()
    queue = work.queue(tmp_path)
    queue.offer(statistics("a"), tmp_path)

    def more() -> None:
        if work.begun:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.work(more=more)
    queue.close()
    assert [row.state for row in State(tmp_path).jobs()] == ["running"]
    assert work.over == []


def test_job_that_waits_is_aborted_at_once_and_never_runs(tmp_path: Path) -> None:
    work = Work()
    work.free.set()
    queue = work.queue(tmp_path)
    queue.submit(statistics("a", "b"))
    assert queue.abort("a", "by hand") is JobState.ABORTED
    with pytest.raises(SettingsError, match="job a is over already: aborted"):
        queue.abort("a", "again")
    with pytest.raises(SettingsError, match="there is no job c here; the jobs are a, b"):
        queue.abort("c", "?")
    queue.work()
    assert work.begun == ["b"]
    # the next server does not run it either
    again = Work()
    queue = again.queue(tmp_path)
    queue.restore()
    queue.work()
    assert again.begun == []


def test_name_of_an_earlier_job_is_refused_and_none_of_the_others_is_entered(tmp_path: Path) -> None:
    queue = Work().queue(tmp_path)
    queue.submit(statistics("a"))
    with pytest.raises(SettingsError, match=r"a job of this name already: a \(waiting\); give the new one another"):
        queue.submit(statistics("b", "a"))
    assert [row.name for row in State(tmp_path).jobs()] == ["a"]
    with pytest.raises(SettingsError, match="job 'a' was submitted by an administrator"):
        queue.offer(statistics("a"), tmp_path)


def test_state_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "state.sqlite")
    old.executescript("""
        create table sites (name text primary key, version text, first_joined text, last_joined text);
        create table jobs (name text primary key, digest text, started text, finished text);
        insert into jobs values ('one', 'x', '2026-01-01', '2026-01-02'), ('two', 'y', '2026-01-03', null);
        pragma user_version = 1;
    """)
    old.close()
    rows = State(tmp_path).jobs()
    assert [(row.name, row.state, row.origin, row.finished) for row in rows] == [
        ("one", "done", "file", "2026-01-02"),
        ("two", "waiting", "file", None),
    ]


# job files


def test_files_that_jobs_name_must_lie_beside_the_job_file(tmp_path: Path) -> None:
    client = {"script": "train.py", "files": ["net.py"], "initial": "net.py:make"}
    made = JobsFile.model_validate({"jobs": [{"workflow": "fedavg", "model": "first.safetensors", "client": client}]})
    (tmp_path / "net.py").write_text("")
    with pytest.raises(SettingsError) as caught:
        check_job_files(made.jobs, tmp_path, "job.yaml")
    assert str(caught.value).splitlines() == [
        f"job.yaml: job fedavg: there is no file train.py in {tmp_path}; put it beside the job file",
        f"job.yaml: job fedavg: there is no file first.safetensors in {tmp_path}; put it beside the job file",
    ]
    (tmp_path / "train.py").write_text("")
    (tmp_path / "first.safetensors").write_text("")
    assert set(check_job_files(made.jobs, tmp_path, "job.yaml")) == {"train.py", "net.py", "first.safetensors"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", "..", "a\\b"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    job = {"workflow": "fedavg", "model": name, "client": {"script": "train.py"}}
    with pytest.raises(ValueError, match=r"fedavg\.model"):
        JobsFile.model_validate({"jobs": [job]})
    job = {"workflow": "fedavg", "client": {"script": name}}
    with pytest.raises(ValueError, match=r"client\.script"):
        JobsFile.model_validate({"jobs": [job]})


def test_function_of_a_file_that_is_not_sent_is_refused(tmp_path: Path) -> None:
    job = {"workflow": "fedavg", "client": {"script": "train.py", "initial": "net.py:make"}}
    with pytest.raises(SettingsError, match=r"net\.py is not sent to the sites; add it to client\.files"):
        check_job_files(JobsFile.model_validate({"jobs": [job]}).jobs, tmp_path, "job.yaml")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_a_valid_job_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(template(name))
    file = settings.load(tmp_path / "job.yaml", JobsFile)
    section = TEMPLATES[name].section
    assert type(file.jobs[0]) is section
    # only what a template is about differs from the settings' own defaults
    shown = file.jobs[0].model_dump()
    needed = {key: shown[key] for key, field in section.model_fields.items() if field.is_required()}
    default = section.model_validate(needed).model_dump()
    changed = {key for key in shown if shown[key] != default[key]}
    assert changed <= {key.partition(".")[0] for key in TEMPLATES[name].values}


def test_unknown_template_names_those_that_there_are() -> None:
    with pytest.raises(SettingsError, match=r"'fedavgg': there is none; did you mean 'fedavg'\? there are fedavg, "):
        template("fedavgg")


def test_site_policies_know_every_workflow() -> None:
    known = set(typing.get_args(settings.WorkflowName))
    jobs = settings.JobsFile.model_json_schema()["properties"]["jobs"]["items"]["discriminator"]["mapping"]
    assert known == set(jobs)


# a running server


@dataclass
class Serving:
    federation: Any
    server: Any
    stopping: threading.Event = field(default_factory=threading.Event)
    running: Future[None] | None = None

    def start(self) -> None:
        def more() -> None:
            if self.stopping.is_set():
                raise KeyboardInterrupt

        self.running = self.federation.pool.submit(self.server.run, more_jobs=more)

    def stop(self) -> None:
        self.stopping.set()
        if self.running is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self.running.result(20)

    def admin(self, party: str = "admin") -> AdminClient:
        kit, credentials = self.federation.kit(party), self.federation.credentials(party)
        return AdminClient(kit, credentials, server=self.federation.address, driver="memory")


@pytest.fixture
def serving(federation: Any) -> Iterator[Serving]:
    nothing = federation.jobs().model_copy(update={"jobs": []})
    made = Serving(federation, federation.server(nothing))
    made.start()
    yield made
    made.stop()


def start_sites(federation: Any, **options: Any) -> list[Future[None]]:
    return [federation.start(federation.site(name, connect_deadline_s=2, **options)) for name in SITES]


def finished(admin: AdminClient, name: str) -> bool:
    return JobState(admin.show(name).state).is_over


class Slow:
    """Executors of which training waits until it may go on."""

    def __init__(self, federation: Any) -> None:
        self.executors = federation.fakes()
        self.training, self.free = threading.Event(), threading.Event()
        self.abandoned: list[str] = []
        train = self.executors["train"]
        answer = train.answer

        def wait(model: FLModel, context: Any) -> FLModel:
            self.training.set()
            assert self.free.wait(30)
            return answer(model, context)

        train.answer = wait
        train.abandon = self._abandon

    def _abandon(self, job: str) -> None:
        self.abandoned.append(job)
        self.free.set()


def test_submitted_job_runs_and_its_results_come_back(serving: Serving, tmp_path: Path) -> None:
    start_sites(serving.federation)
    with serving.admin() as admin:
        [entered] = admin.submit(named(serving.federation, "study", rounds=2), tmp_path)
        assert (entered.name, entered.workflow, entered.origin) == ("study", "classify", "admin")
        lines = [json.loads(line) for line in admin.log("study", follow=True)]
        assert [each["event"] for each in lines if each["event"].startswith("job")] == [
            "job submitted",
            "job begins",
            "job done",
        ]
        assert {each["job"] for each in lines} == {"study"}
        assert [each["round"] for each in lines if each["event"] == "round"] == [0, 1, 2]
        shown = admin.show("study")
        assert (shown.state, shown.rounds, shown.runs["3-seed-0"].finished) == ("done", 2, True)
        files = admin.download("study", tmp_path / "results")
    names = {str(path.relative_to(tmp_path / "results")) for path in files}
    assert {"metrics.csv", "events.jsonl"} < names
    kept = serving.federation.folder / "server/models/study/3-seed-0/round-00002.safetensors"
    fetched = tmp_path / "results/3-seed-0/round-00002.safetensors"
    assert fetched.read_bytes() == kept.read_bytes()
    assert (tmp_path / "results/metrics.csv").read_text().startswith("party,model,split,seed,round,metric,value\n")
    assert len((tmp_path / "results/events.jsonl").read_text().splitlines()) >= len(lines)


def test_several_processes_of_the_administrator_are_served_at_the_same_time(serving: Serving, tmp_path: Path) -> None:
    with serving.admin() as one, serving.admin() as two:
        one.submit(named(serving.federation, "study"), tmp_path)
        following = serving.federation.pool.submit(lambda: list(one.log("study", follow=True)))
        # no site is here: the job waits for them, and the other process ends it
        wait_until(lambda: two.show("study").state == "running")
        assert two.abort("study").state == "aborted"
        assert '"event":"job aborted"' in following.result(10)[-1]


def test_running_job_is_aborted_within_seconds_and_the_next_one_runs(serving: Serving, tmp_path: Path) -> None:
    slow = Slow(serving.federation)
    sites = [serving.federation.start(serving.federation.site("site-1", slow.executors, connect_deadline_s=2))]
    sites += [serving.federation.start(serving.federation.site(name, connect_deadline_s=2)) for name in SITES[1:]]
    with serving.admin() as admin:
        admin.submit(named(serving.federation, "long", "next", rounds=1), tmp_path)
        assert slow.training.wait(20)
        began = time.monotonic()
        ended = admin.abort("long")
        assert time.monotonic() - began < 5
        assert (ended.state, ended.reason) == ("aborted", "aborted by admin")
        wait_until(lambda: finished(admin, "next"))
        assert admin.show("next").state == "done"
    # the executor at the site was told while it worked, and its late result never counted
    assert slow.abandoned == ["long"]
    assert events(serving.federation.folder / "site-1", "job aborted")[0]["reason"] == "aborted by admin"
    assert not any(site.done() for site in sites)


def test_job_that_fails_ends_alone_and_sites_stay(serving: Serving, tmp_path: Path) -> None:
    broken = serving.federation.fakes()

    def fail(model: FLModel, context: Any) -> FLModel:
        if model.meta.get("spec", {}) is not None and context.job == "bad":
            raise FederationError("no room for it")
        return FLModel()

    broken["publish"].answer = fail
    sites = [serving.federation.start(serving.federation.site("site-1", broken, connect_deadline_s=2))]
    sites += [serving.federation.start(serving.federation.site(name, connect_deadline_s=2)) for name in SITES[1:]]
    with serving.admin() as admin:
        admin.submit(named(serving.federation, "bad", "good", rounds=1), tmp_path)
        wait_until(lambda: finished(admin, "good"))
        bad, good = admin.jobs()
        assert (bad.state, good.state) == ("failed", "done")
        assert "site-1" in bad.reason
        assert "no room for it" in bad.reason
    assert not any(site.done() for site in sites)


def test_jobs_at_once_give_the_bits_that_they_give_in_turn(federation: Any) -> None:
    def models(folder: Path, job: str) -> dict[str, bytes]:
        found = open_file(folder / "server/models" / job / "3-seed-0/round-00003.safetensors")
        return {name: value.tobytes() for name, value in found.items()}

    for aggregation in ("memory", "lockstep"):
        made = named(federation, f"{aggregation}-a", f"{aggregation}-b")
        jobs = [job.model_copy(update={"aggregation": aggregation}) for job in made.jobs]
        limits = made.federation.model_copy(update={"jobs_at_once": 2})
        file = made.model_copy(update={"jobs": jobs, "federation": limits})
        running = federation.start(federation.server(file))
        sites = [federation.start(federation.site(name)) for name in SITES]
        running.result(60)
        for site in sites:
            site.result(20)
    begun = events(federation.folder / "server", "job begins", "job done")
    # the second began before the first was done
    assert [each["event"] for each in begun[:2]] == ["job begins", "job begins"]
    metrics = State(federation.folder / "server")
    rows = {name: metrics.metrics(name) for name in ("memory-a", "memory-b", "lockstep-a", "lockstep-b")}
    assert rows["memory-a"] == rows["memory-b"] == rows["lockstep-a"] == rows["lockstep-b"]
    assert models(federation.folder, "memory-a") == models(federation.folder, "memory-b")


# the policy of a site


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(workflows=("fedavg",)), "takes no part in workflow 'classify' (takes part in: fedavg)"),
        (Policy(max_rounds=2), "takes part in at most 2 rounds, this job has 3"),
    ],
)
def test_site_refuses_by_its_operators_rules(policy: Policy, reason: str, federation: Any) -> None:
    server = federation.start(federation.server(federation.jobs(rounds=3)))
    sites = [federation.start(federation.site("site-1", policy=policy))]
    sites += [federation.start(federation.site(name)) for name in SITES[1:]]
    with pytest.raises(FederationError, match="site-1: refused: the policy of site-1: it takes") as caught:
        server.result(30)
    assert reason in str(caught.value)
    for site in sites:
        with pytest.raises(FedbioError):
            site.result(20)
    assert events(federation.folder / "site-1", "task refused")[0]["reason"].endswith(reason)


def test_policy_that_allows_a_job_lets_it_run(federation: Any) -> None:
    policy = Policy(workflows=("classify",), max_rounds=3)
    server = federation.start(federation.server(federation.jobs(rounds=3)))
    for site in [federation.start(federation.site(name, policy=policy)) for name in SITES]:
        site.result(30)
    server.result(30)


def test_code_runs_only_if_its_content_was_allowed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_bytes(b"print()")
    mine, other = hashlib.sha256(b"print()").hexdigest(), hashlib.sha256(b"exit()").hexdigest()
    rules: dict[str, Any] = {"workflows": None, "max_rounds": None}
    by_file = Policy.read(tmp_path, code=["train.py"], **rules)
    assert by_file.allows_code(mine, "train.py")
    # the same name with another content
    assert not by_file.allows_code(other, "train.py")
    assert Policy.read(tmp_path, code=[other], **rules).allows_code(other, "any-name.py")
    assert Policy.read(tmp_path, code=["any"], **rules).allows_code(other, "x.py")
    assert not Policy.read(tmp_path, code=[], **rules).allows_code(mine, "train.py")
    with pytest.raises(SettingsError, match=r"code: there is no file tra\.py in"):
        Policy.read(tmp_path, code=["tra.py"], **rules)


# hostile submissions


@pytest.fixture
def raw(serving: Serving) -> Callable[..., list[words.Answer]]:
    """Sends any bytes as a party; returns what the server answers."""

    def send(party: str, topic: str, body: bytes, payload: Any = None) -> list[words.Answer]:
        answers: list[words.Answer] = []
        arrived = threading.Event()

        def take(received: Received) -> None:
            answers.append(unpack(words.Answer, received.body))
            arrived.set()

        with SiteEndpoint(
            serving.federation.address,
            serving.federation.credentials(party),
            spool=serving.federation.folder / "raw",
            on_message=take,
            driver="memory",
            connect_deadline_s=5,
        ) as endpoint:
            endpoint.send(topic, body, payload, 10)
            arrived.wait(2)
        return answers

    return send


JOB = json.dumps({"jobs": [{"workflow": "fedavg", "client": {"script": "train.py"}}]})
ID = "0" * 32


def submission(*files: tuple[str, bytes], jobs: str = JOB, sizes: int | None = None) -> bytes:
    """A request as a hostile client may write it: nothing is checked here."""
    listed = [
        {"name": name, "size": len(content) if sizes is None else sizes, "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files
    ]
    return msgspec.msgpack.encode({"type": "Submit", "id": ID, "jobs": jobs, "files": listed})


def payload(*contents: bytes) -> BytesPayload:
    return BytesPayload(contents, size=sum(map(len, contents)))


@pytest.mark.parametrize("name", ["../train.py", "/tmp/train.py", "a/b.py", "..", ".x", "a\0b", "n" * 200])
def test_submitted_names_that_lead_elsewhere_are_refused(name: str, raw: Any, serving: Serving) -> None:
    with pytest.raises(TransportError, match="not a request"):
        raw("admin", words.SUBMIT, submission((name, b"x")), payload(b"x"))
    assert not (serving.federation.folder / "server/jobs").exists()


def test_submitted_sizes_are_checked_before_the_first_byte(raw: Any, serving: Serving) -> None:
    with pytest.raises(TransportError, match="must have the sizes that it names"):
        raw("admin", words.SUBMIT, submission(("train.py", b"x"), sizes=1 << 40), payload(b"x"))
    with pytest.raises(TransportError, match="not a request"):
        raw("admin", words.SUBMIT, submission(("train.py", b"x"), sizes=-1), payload(b"x"))

    class Huge(BytesPayload):
        """Says that it has a terabyte, and has nothing."""

        def __init__(self) -> None:
            super().__init__((), size=1 << 40)

    with pytest.raises(TransportError, match="of 1099511627776 bytes, at most 274877906944 are allowed"):
        raw("admin", words.SUBMIT, submission(("train.py", b"x"), sizes=1 << 40), Huge())
    many = [(f"f{number}.py", b"x") for number in range(words.MAX_FILES + 1)]
    with pytest.raises(TransportError, match="not a request"):
        raw("admin", words.SUBMIT, submission(*many), payload(*(content for _, content in many)))
    long = " " * (words.MAX_SETTINGS_CHARACTERS + 1)
    with pytest.raises(TransportError, match="not a request"):
        raw("admin", words.SUBMIT, submission(("train.py", b"x"), jobs=long), payload(b"x"))
    assert State(serving.federation.folder / "server").jobs() == []


def test_files_that_are_not_what_was_announced_are_refused(raw: Any, serving: Serving) -> None:
    [answer] = raw("admin", words.SUBMIT, submission(("train.py", b"one")), payload(b"two"))
    assert answer.error == "file train.py: what came is not what was announced; submit again"
    [answer] = raw("admin", words.SUBMIT, submission(("train.py", b"1"), ("more.py", b"2")), payload(b"1", b"2"))
    assert "the files that came are not those that they name: train.py" in answer.error
    [answer] = raw("admin", words.REQUEST, submission())
    assert "the files that came are not those that they name: train.py" in answer.error
    twice = submission(("train.py", b"1"), ("train.py", b"2"))
    [answer] = raw("admin", words.SUBMIT, twice, payload(b"1", b"2"))
    assert "the files that came are not those that they name" in answer.error
    [answer] = raw("admin", words.REQUEST, submission(jobs='{"jobs": [{"workflow": "steal"}]}'))
    assert answer.error.startswith("jobs: jobs.0: expected 'workflow' to be one of")
    [answer] = raw("admin", words.REQUEST, submission(jobs="["))
    assert answer.code == 2
    assert State(serving.federation.folder / "server").jobs() == []


def test_code_for_the_server_itself_is_not_taken_from_afar(raw: Any, serving: Serving) -> None:
    job = json.dumps({"jobs": [{"workflow": "custom", "controller": "mine.py:Mine"}]})
    [answer] = raw("admin", words.SUBMIT, submission(("mine.py", b"x"), jobs=job), payload(b"x"))
    assert answer.code == 4
    assert "runs in the server's process and is not taken from afar" in answer.error
    assert State(serving.federation.folder / "server").jobs() == []
    assert not (serving.federation.folder / "server/jobs").exists()


@pytest.mark.parametrize("party", ["site-1", "site-2"])
def test_certificate_of_a_site_may_ask_for_nothing(party: str, raw: Any, serving: Serving) -> None:
    with pytest.raises(TransportError, match=f"{party} may not submit jobs; only admin may"):
        raw(party, words.SUBMIT, submission(("train.py", b"x")), payload(b"x"))
    [answer] = raw(party, words.REQUEST, pack(words.ListJobs(ID)))
    assert (answer.code, answer.jobs) == (4, ())
    assert answer.error == f"{party} is no administrator of this server"
    refused = events(serving.federation.folder / "server", "request refused")
    assert {each["peer"] for each in refused} == {party}


def test_administrator_is_no_site(raw: Any, serving: Serving, tmp_path: Path) -> None:
    assert raw("admin", "join", msgspec.msgpack.encode({"version": "0"})) == []
    assert events(serving.federation.folder / "server", "site joined") == []
    assert events(serving.federation.folder / "server", "request refused")[0]["peer"].startswith("admin:")


def test_client_of_a_site_is_refused_with_a_reason(serving: Serving) -> None:
    with serving.admin("site-1") as client, pytest.raises(RefusedError, match="site-1 is no administrator"):
        client.jobs()


def test_error_of_the_server_is_the_clients(serving: Serving, tmp_path: Path) -> None:
    with serving.admin() as admin:
        for ask in (admin.show, admin.abort):
            with pytest.raises(InputError, match="there is no job nothing here; the jobs are none"):
                ask("nothing")
        with pytest.raises(InputError, match="there is no job nothing here"):
            admin.download("nothing", tmp_path / "out")
        with pytest.raises(InputError, match="there is no job nothing here"):
            list(admin.log("nothing", follow=True))


@pytest.mark.parametrize("path", [("..", "x"), ("a", "../x"), ("/etc", "x"), (), ("a",) * 9])
def test_results_cannot_leave_the_folder_of_a_download(path: tuple[str, ...]) -> None:
    body = msgspec.msgpack.encode({"id": ID, "path": path, "size": 1})
    with pytest.raises(ProtocolError, match="not a ResultFile"):
        unpack(words.ResultFile, body)


def test_submitted_script_lies_in_the_folder_of_its_job(serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('hello')")
    made = JobsFile.model_validate_json(JOB)
    with serving.admin() as admin:
        admin.submit(made, tmp_path)
        with pytest.raises(InputError, match=r"a job of this name already: fedavg"):
            admin.submit(made, tmp_path)
        assert (serving.federation.folder / "server/jobs/fedavg/train.py").read_text() == "print('hello')"
        assert admin.abort("fedavg").state == "aborted"
