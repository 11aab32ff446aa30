"""`fedbio job` as an administrator uses it: a server that serves, two sites, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedbio.tensors import open_file

from .conftest import FEDBIO, Parties, make_parties

SITES = ("site-1", "site-2")

SCRIPT = """
import os, time
import numpy as np
import fedbio.client as flare

def initial_model():
    return {"w": np.zeros(3, np.float32)}

def main():
    flare.init()
    while flare.is_running():
        model = flare.receive()
        open(os.environ["MARKS"] + "/" + flare.get_site_name(), "w").write(str(os.getpid()))
        time.sleep(float(__import__("sys").argv[1]))
        params = {name: value + 1 for name, value in model.params.items()}
        flare.send(flare.FLModel(params=params, metrics={"accuracy": model.current_round / 10}))

if __name__ == "__main__":
    main()
"""


class Admin:
    """Runs `fedbio job` in a folder."""

    def __init__(self, parties: Parties) -> None:
        self.parties, self.folder = parties, parties.folder
        self.kit = ("--kit", str(parties.folder / "kits/admin"))

    def __call__(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            [*FEDBIO, "job", *arguments, "--json"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr + self.parties.log("server")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def ask(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        return self(*arguments, *self.kit, code=code)

    def follow(self, name: str) -> list[dict[str, Any]]:
        """The events of a job until it is over."""
        command = [*FEDBIO, "job", "log", name, "-f", *self.kit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def wait_for(self, name: str, state: str, within_s: float = 60) -> None:
        deadline = time.monotonic() + within_s
        while (found := self.ask("show", name)["job"]["state"]) != state:
            assert time.monotonic() < deadline, (found, self.parties.log("server"))
            time.sleep(0.2)


@pytest.fixture
def parties(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parties]:
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    made = make_parties(tmp_path, free_port, count=40)
    federation = {"heartbeat_s": 2, "join_deadline_s": 60}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [], "sites": list(SITES), "federation": federation}))
    (tmp_path / "train.py").write_text(SCRIPT)
    yield made
    made.end()


def serve(parties: Parties) -> subprocess.Popen[bytes]:
    kit, jobs, output = (str(parties.folder / name) for name in ("kits/server", "jobs.yaml", "server"))
    return parties.start("server", "server", "--kit", kit, "--jobs", jobs, "-o", output, "--serve")


def start_sites(parties: Parties) -> None:
    for site in SITES:
        parties.site(site, "--code", str(parties.folder / "train.py"))


def write_job(parties: Parties, name: str, *, seconds: float, rounds: int) -> str:
    client = {"script": "train.py", "initial": "train.py:initial_model", "arguments": [str(seconds)]}
    job = {"name": name, "workflow": "fedavg", "rounds": rounds, "client": client}
    path = parties.folder / f"{name}.json"
    path.write_text(json.dumps({"jobs": [job]}))
    return str(path)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_job_from_its_template_to_its_results(parties: Parties) -> None:
    admin, folder = Admin(parties), parties.folder
    serve(parties)
    start_sites(parties)
    made = admin("new", "statistics", "-o", str(folder / "statistics.yaml"))
    assert made == {"template": "statistics", "file": str(folder / "statistics.yaml")}
    parties.wait_for("server", "listening")
    [entered] = admin.ask("submit", made["file"])["jobs"]
    assert (entered["name"], entered["workflow"], entered["origin"]) == ("statistics", "statistics", "admin")
    events = admin.follow("statistics")
    assert [each["event"] for each in events if each["event"].startswith("job")] == [
        "job submitted",
        "job begins",
        "job done",
    ]
    assert admin.ask("log", "statistics") == {"job": "statistics", "events": len(events), "state": "done"}
    [listed] = admin.ask("list")["jobs"]
    assert (listed["state"], listed["reason"]) == ("done", "")
    assert listed["submitted"] <= listed["started"] <= listed["finished"]
    shown = admin.ask("show", "statistics")["job"]
    assert shown["settings"]["min_count"] == 5
    assert shown["sites"] == list(SITES)
    files = admin.ask("download", "statistics", "-o", str(folder / "results"))["files"]
    assert {Path(path).name for path in files} >= {"statistics.json", "statistics.csv", "events.jsonl"}
    counted = json.loads((folder / "results/statistics.json").read_text())
    assert (counted["format"], counted["job"]) == ("fedbio-statistics", "statistics")
    # the same name again, and what is not there
    again = admin.ask("submit", made["file"], code=2)
    assert "there is a job of this name already: statistics (done)" in again["error"]
    assert "there is no job nothing here" in admin.ask("show", "nothing", code=2)["error"]
    renamed = admin.ask("submit", made["file"], "--name", "second")
    assert renamed["jobs"][0]["name"] == "second"
    admin.wait_for("second", "done")


@pytest.mark.slow
def test_running_script_is_aborted_within_seconds_and_the_next_job_trains(parties: Parties) -> None:
    admin, folder = Admin(parties), parties.folder
    serve(parties)
    start_sites(parties)
    parties.wait_for("server", "listening")
    admin.ask("submit", write_job(parties, "long", seconds=600, rounds=2))
    admin.ask("submit", write_job(parties, "short", seconds=0, rounds=2))
    marks = [folder / "marks" / site for site in SITES]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in marks):
        assert time.monotonic() < deadline, parties.log("server") + parties.log("site-1")
        time.sleep(0.05)
    scripts = [int(path.read_text()) for path in marks]
    assert [each["state"] for each in admin.ask("list")["jobs"]] == ["running", "waiting"]
    began = time.monotonic()
    assert admin.ask("abort", "long")["job"]["state"] == "aborted"
    assert time.monotonic() - began < 15  # with the start of a process on a busy machine
    admin.wait_for("short", "done")
    assert not any(is_alive(pid) for pid in scripts)
    admin.ask("download", "short", "-o", str(folder / "results"))
    np.testing.assert_array_equal(open_file(folder / "results/last.safetensors")["w"], np.full(3, 2, np.float32))
    assert (folder / "results/best.safetensors").exists()
    assert "is over already: done" in admin.ask("abort", "short", code=2)["error"]


@pytest.mark.slow
def test_killed_server_goes_on_with_what_ran_and_waited(parties: Parties) -> None:
    admin, folder = Admin(parties), parties.folder
    server = serve(parties)
    start_sites(parties)
    parties.wait_for("server", "listening")
    admin.ask("submit", write_job(parties, "first", seconds=0.3, rounds=6))
    admin.ask("submit", write_job(parties, "second", seconds=0, rounds=1))
    deadline = time.monotonic() + 60
    while not (admin.ask("show", "first")["job"]["runs"].get("model") or {"round": 0})["round"]:
        assert time.monotonic() < deadline, parties.log("server")
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    # the submitted files are the server's own by now
    (folder / "train.py").unlink()
    serve(parties)
    admin.wait_for("first", "done")
    admin.wait_for("second", "done")
    assert [each["name"] for each in admin.ask("list")["jobs"]] == ["first", "second"]
    admin.ask("download", "first", "-o", str(folder / "results"))
    np.testing.assert_array_equal(open_file(folder / "results/last.safetensors")["w"], np.full(3, 6, np.float32))


@pytest.mark.slow
def test_only_the_administrators_kit_is_taken(parties: Parties) -> None:
    admin = Admin(parties)
    refused = admin("list", "--kit", str(parties.folder / "kits/site-1"), code=2)
    assert "role: the kit of site-1 is for a site, not for an admin" in refused["error"]
    missing = admin(
        "submit", write_job(parties, "x", seconds=0, rounds=1), *admin.kit, "--connect-deadline", "1", code=3
    )
    assert "not reached within 1 s" in missing["error"]
    (parties.folder / "train.py").unlink()
    absent = admin("submit", str(parties.folder / "x.json"), *admin.kit, code=2)
    assert "there is no file train.py in" in absent["error"]
