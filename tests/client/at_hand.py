"""A script within the test: its session and its link are the real ones, and the test is the site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fedbio.client.link import Metric, QueueLink
from fedbio.client.session import leave, offer
from fedbio.federation.model import FLModel, Result, Task

ABOUT = {"site_name": "site-1", "job_id": "job-1", "data": "", "workspace": ""}


class AtHand:
    """Gives tasks to the script that runs on this thread, and keeps what it answers."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.metrics: list[Metric] = []
        self.link = QueueLink(ABOUT, lambda task: None, self.results.append, self.metrics.append)

    def ask(self, name: str, params: dict[str, Any], current_round: int = 0) -> None:
        """Have the script do one task."""
        arrays = {key: value.detach().numpy().copy() for key, value in params.items()}
        model = FLModel(params=arrays, current_round=current_round, total_rounds=3)
        self.link.put(Task(name=f"client/{name}", model=model, job="job-1"))

    def end(self) -> None:
        """There will be no more tasks."""
        self.link.put(None)


@pytest.fixture
def here() -> Iterator[AtHand]:
    found = AtHand()
    offer(found.link, lambda: "torch")
    yield found
    leave()
