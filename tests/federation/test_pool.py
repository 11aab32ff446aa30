"""Sites that a few processes play: the same bits as sites of their own, few in memory, processes that are killed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import DataError, FedbioError, FederationError
from fedbio.federation import Server, Site
from fedbio.federation.pool import Pool
from fedbio.federation.pool_messages import Orders, SiteSpec
from fedbio.provision import provision
from fedbio.results import read_party
from fedbio.settings import FederationFile, JobsFile, KitFile, load
from fedbio.transport import Credentials

NAMES = [f"site-{number}" for number in range(1, 8)]
ALLOW = ["statistics", "train", "evaluate", "publish"]
HERE = Path(__file__).parent


class Played:
    """A federation of seven sites, to be played by a pool or by threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = {"federation": "test", "server": {"address": "localhost:1"}, "sites": NAMES}
        provision(FederationFile.model_validate(settings), folder / "kits")
        self.saved: list[Any] = []
        self.failures: list[FedbioError] = []

    def server(self, jobs: JobsFile, name: str = "server", **options: Any) -> Server:
        return Server(
            kit=load(self.folder / "kits/server/kit.yaml", KitFile),
            credentials=Credentials.from_kit(self.folder / "kits/server"),
            jobs=jobs,
            workspace=self.folder / name,
            save_model=lambda params, _: self.saved.append({name: np.array(each) for name, each in params.items()}),
            **options,
        )

    def play(self, jobs: JobsFile, executors: str = "executors", *, processes: int = 2, **orders: Any) -> None:
        sites = [
            SiteSpec(
                name, str(self.folder / "kits" / name), str(self.folder / f"{name}.fasta"), str(self.folder / name)
            )
            for name in NAMES
        ]
        given = {"allow": ALLOW, "quantization": ["float16", "int8"], "resident": 64, **orders}
        pool = Pool(
            orders=Orders(sites=sites, executors=f"pool_sites:{executors}", folders=[], prefix="", **given),
            processes=processes,
            environment={**os.environ, "PYTHONPATH": str(HERE)},
            folder=self.folder / "pool",
        )
        server = self.server(jobs, listen="pool", endpoint=pool.endpoint(lambda error: self._fail(server, error)))
        server.run()

    def _fail(self, server: Server, error: FedbioError) -> None:
        self.failures.append(error)
        server.give_up(error)

    def calls(self, site: str) -> list[list[int]]:
        """Process, round and number of each training."""
        return [
            [int(word) for word in line.split()] for line in (self.folder / site / "calls").read_text().splitlines()
        ]


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


@pytest.fixture
def jobs_of_seven(federation: Any) -> Any:
    return federation.jobs


def by_threads(folder: Path, jobs: JobsFile, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the model that the same sites make as threads that reach their server by the memory driver."""
    monkeypatch.syspath_prepend(HERE)
    pool_sites = importlib.import_module("pool_sites")
    own = Played(folder)
    with ThreadPoolExecutor(8) as pool:
        server = pool.submit(own.server(jobs, listen="memory:pool-test", driver="memory").run)
        sites = [
            Site(
                kit=load(folder / "kits" / name / "kit.yaml", KitFile),
                credentials=Credentials.from_kit(folder / "kits" / name),
                workspace=folder / name,
                data=folder / f"{name}.fasta",
                executors=pool_sites.executors(),
                allow=ALLOW,
                server="memory:pool-test",
                driver="memory",
                connect_deadline_s=20,
            )
            for name in NAMES
        ]
        for each in [server, *(pool.submit(site.run) for site in sites)]:
            each.result(60)
    [model] = own.saved
    return model


def assert_same(model: dict[str, Any], other: dict[str, Any]) -> None:
    assert model.keys() == other.keys()
    for name, value in model.items():
        assert value.dtype == other[name].dtype
        assert value.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize(
    ("few", "aggregation", "quantization"),
    [
        ({"resident": 1}, "memory", None),
        # memory is short at once
        ({"memory_bytes": 1}, "file", None),
        ({"resident": 1}, "lockstep", None),
        ({"resident": 1}, "memory", {"to_sites": "float16", "to_server": "int8", "error_feedback": True}),
    ],
)
def test_same_bits_as_sites_of_their_own_with_few_of_them_in_memory(
    played: Played,
    jobs_of_seven: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    few: dict[str, int],
    aggregation: str,
    quantization: Any,
) -> None:
    what = jobs_of_seven(rounds=3, quantization=quantization)
    what = what.model_copy(update={"jobs": [what.jobs[0].model_copy(update={"aggregation": aggregation})]})
    played.play(what, **few)
    [model] = played.saved
    assert_same(model, by_threads(tmp_path / "threads", what, monkeypatch))
    numbers = [[number for _, _, number in played.calls(site)] for site in NAMES]
    if aggregation == "lockstep":
        # what it has trained stays with it until it is averaged
        assert all(each[0] == 1 for each in numbers)
    elif quantization is None:
        # each time a new object, but for one that is the last of a round at its process and the first of the next
        assert sum(each == 1 for found in numbers for each in found) >= 3 * 7 - 2 * 2
    else:
        # what quantization took from the last model is nowhere else
        assert numbers == [[1, 2, 3]] * 7


def test_every_site_keeps_its_own_record_and_processes_keep_to_their_sites(played: Played, jobs_of_seven: Any) -> None:
    played.play(jobs_of_seven(rounds=2))
    processes = {site: {process for process, _, _ in played.calls(site)} for site in NAMES}
    assert all(len(found) == 1 for found in processes.values())
    assert len(set.union(*processes.values())) == 2
    # there is memory for all of them
    assert [number for _, _, number in played.calls("site-1")] == [1, 2]
    for site in NAMES:
        record = read_party(played.folder / site / "party.json")
        assert record.party == site
        # initialize goes to one site, each of two rounds to all
        assert record.sent["model"].messages in (2, 3)
        assert not (played.folder / site / "unfinished.json").exists()
    assert list((played.folder / "pool").glob("payloads/*")) == []


def test_killed_process_is_followed_by_another_and_the_result_is_the_same(
    played: Played, jobs_of_seven: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = jobs_of_seven(rounds=3)
    (played.folder / "hold").write_text("site-3 1")

    def kill() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (played.folder / "site-3/calls").exists() and played.calls("site-3")[-1][1] == 1:
                os.kill(played.calls("site-3")[-1][0], signal.SIGKILL)
                (played.folder / "hold").unlink()
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    played.play(what)
    killer.join()
    events = [json.loads(line) for line in (played.folder / "server/events.jsonl").read_text().splitlines()]
    assert {each["site"] for each in events if each["event"] == "site gone"} >= {"site-1", "site-3", "site-5", "site-7"}
    trained = played.calls("site-3")
    assert [number for _, number, _ in trained] == [0, 1, 1, 2]
    assert len({process for process, _, _ in trained}) == 2
    [model] = played.saved
    assert_same(model, by_threads(tmp_path / "threads", what, monkeypatch))


def test_task_that_is_not_allowed_is_refused_and_named(played: Played, jobs_of_seven: Any) -> None:
    with pytest.raises(FederationError, match="site-2: refused: the policy of site-2 does not allow 'train'"):
        played.play(jobs_of_seven(), allow=["statistics"])
    assert played.failures == []


def test_site_with_bad_data_ends_the_simulation_with_its_own_error(played: Played, jobs_of_seven: Any) -> None:
    with pytest.raises(FederationError, match="site-2: failed: its own data are refused"):
        played.play(jobs_of_seven(), "with_bad_data")
    [culprit] = played.failures
    assert str(culprit) == "site-2: proteins.fasta:7: bad label"
    assert culprit.exit_code == DataError("").exit_code


def test_job_goes_on_without_a_failed_site_if_enough_are_left(played: Played, jobs_of_seven: Any) -> None:
    played.play(jobs_of_seven(rounds=2, min_sites=6), "with_bad_data")
    assert len(played.saved) == 1
    assert played.failures == []


def test_bug_at_a_site_ends_the_simulation(played: Played, jobs_of_seven: Any) -> None:
    with pytest.raises(FedbioError, match="site-2"):
        played.play(jobs_of_seven(), "with_a_bug")
    assert "site-2: ZeroDivisionError: division by zero" in [str(each) for each in played.failures]
    logs = "".join(path.read_text() for path in (played.folder / "pool").glob("process-*.txt"))
    assert "Traceback" in logs


def test_process_that_cannot_begin_is_named_with_its_last_lines(played: Played, jobs_of_seven: Any) -> None:
    with pytest.raises(FederationError, match=r"(?s)process . of the pool has ended.*has no attribute 'nobody'"):
        played.play(jobs_of_seven(), "nobody")
