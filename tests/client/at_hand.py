"""A script within the test: its session and its link are the real ones, and the test is the site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbio.client.link import Metric, QueueLink
from fedbio.client.session import leave, offer
from fedbio.federation.model import FLModel, Result, Task


class AtHand:
    """Gives tasks to the script that runs on this thread, and keeps what it answers."""

    def __init__(self, workspace: Path) -> None:
        self.results: list[Result] = []
        self.metrics: list[Metric] = []
        about = {"site_name": "site-1", "job_id": "job-1", "data": "", "workspace": str(workspace)}
        self.link = QueueLink(about, lambda task: None, self.results.append, self.metrics.append)

    def ask(self, name: str, params: dict[str, Any], current_round: int = 0, **meta: Any) -> None:
        """Have the script do one task."""
        arrays = {key: value.detach().numpy().copy() for key, value in params.items()}
        model = FLModel(params=arrays, current_round=current_round, total_rounds=3, meta=meta)
        self.link.put(Task(name=f"client/{name}", model=model, job="job-1"))

    def end(self) -> None:
        """There will be no more tasks."""
        self.link.put(None)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[AtHand]:
    found = AtHand(tmp_path)
    offer(found.link, lambda: "torch")
    yield found
    leave()
