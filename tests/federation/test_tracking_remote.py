"""MLflow at a remote address: what the tracker says arrives at a server that speaks its REST interface.

The server is a stand-in that answers the few calls that are made and keeps what it was told: MLflow's own is not in the
package that the tracker needs (mlflow-skinny).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from fedbio.federation.trackers import MLflow


class Store:
    """What an MLflow server keeps; names of calls and fields as in its REST reference, version 2.0."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.points: list[tuple[str, str, float, int]] = []
        self.tags: list[tuple[str, str, str]] = []
        self.batches: list[int] = []

    def answer(self, call: str, said: dict[str, Any]) -> dict[str, Any] | None:
        """Return the answer to a call; None if what it asks for is not there."""
        if call == "experiments/get-by-name":
            number = self.experiments.get(said["experiment_name"])
            return None if number is None else {"experiment": self.experiment(said["experiment_name"], number)}
        if call == "experiments/create":
            self.experiments[said["name"]] = number = str(len(self.experiments) + 1)
            return {"experiment_id": number}
        if call == "runs/search":
            wanted = said["filter"].removeprefix("attributes.run_name = '").removesuffix("'")
            found = [run for run in self.runs.values() if run["info"]["run_name"] == wanted]
            return {"runs": found}
        if call == "runs/create":
            number = f"run-{len(self.runs) + 1}"
            info = {"run_id": number, "run_uuid": number, "run_name": said["run_name"], "status": "RUNNING",
                    "experiment_id": said["experiment_id"], "lifecycle_stage": "active", "start_time": 1}  # fmt: skip
            self.runs[number] = {"info": info, "data": {}}
            return {"run": self.runs[number]}
        if call == "runs/get":
            return {"run": self.runs[said["run_id"]]}
        if call == "runs/log-batch":
            self.batches.append(len(said["metrics"]))
            self.points += [(said["run_id"], each["key"], each["value"], each["step"]) for each in said["metrics"]]
            return {}
        if call == "runs/set-tag":
            self.tags.append((said["run_id"], said["key"], said["value"]))
            return {}
        if call == "runs/update":
            self.runs[said["run_id"]]["info"]["status"] = said["status"]
            return {"run_info": self.runs[said["run_id"]]["info"]}
        raise AssertionError(f"the tracker calls {call}")

    @staticmethod
    def experiment(name: str, number: str) -> dict[str, Any]:
        return {"experiment_id": number, "name": name, "lifecycle_stage": "active", "artifact_location": "there"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    found = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path)
            self.reply(path.path, {name: values[0] for name, values in parse_qs(path.query).items()})

        def do_POST(self) -> None:
            self.reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, path: str, said: dict[str, Any]) -> None:
            answer = found.answer(path.removeprefix("/api/2.0/mlflow/"), said)
            content = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST"} if answer is None else answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    # the default is minutes of tries
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield found
    server.shutdown()
    server.server_close()


def test_a_remote_mlflow_has_a_run_for_each_site_and_all_numbers_in_batches(store: Store, tmp_path: Path) -> None:
    tracker = MLflow(tmp_path, "study")
    tracker.text("server", "job", "settings", '{"rounds": 2}', 0)
    for step in range(1500):
        tracker.scalar("site-1", "job", "train/loss", step / 4, step)
    tracker.scalar("site-2", "job", "train/loss", 1.0, 0)
    tracker.close()
    assert store.experiments == {"study/job": "1"}
    assert {run["info"]["run_name"]: run["info"]["status"] for run in store.runs.values()} == dict.fromkeys(
        ("server", "site-1", "site-2"), "FINISHED"
    )
    assert store.tags == [("run-1", "settings", '{"rounds": 2}')]
    assert [point[1:] for point in store.points if point[0] == "run-2"] == [
        ("train/loss", step / 4, step) for step in range(1500)
    ]
    assert [point[1:] for point in store.points if point[0] == "run-3"] == [("train/loss", 1.0, 0)]
    # the interface takes a thousand at once
    assert max(store.batches) <= 1000
    assert not list(tmp_path.iterdir())


def test_a_server_that_was_started_again_goes_on_with_the_runs_at_a_remote_mlflow(store: Store, tmp_path: Path) -> None:
    killed = MLflow(tmp_path, "study")
    killed.scalar("site-1", "job", "loss", 0.5, 0)
    killed.flush()
    again = MLflow(tmp_path, "study")
    again.scalar("site-1", "job", "loss", 0.25, 1)
    again.close()
    assert store.points == [("run-1", "loss", 0.5, 0), ("run-1", "loss", 0.25, 1)]
