"""A task that is out: who has it, who has answered, and what is said of it in events."""

from __future__ import annotations

__all__ = ["OpenTask", "is_own_reason"]

from dataclasses import dataclass, field
from typing import Any

from fedbio.federation.acceptance import Expectation
from fedbio.federation.model import Result, Status, Task
from fedbio.transport import Payload


@dataclass(slots=True)
class OpenTask:
    """What the desk knows of a task; `lost` says of a site why it gives no result."""

    task: Task
    body: bytes
    payload: Payload | None
    expected: Expectation
    pending: set[str]
    delivering: set[str] = field(default_factory=set)
    delivered: set[str] = field(default_factory=set)
    results: dict[str, Result] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    bug: BaseException | None = None

    def named(self) -> dict[str, Any]:
        """Return what every event about the task says of it."""
        task = self.task
        return {"task": task.name, "id": task.id, "job": task.job, "round": task.model.current_round}


def is_own_reason(reason: str) -> bool:
    """Whether a reason of `ask`'s `missing` is the site's own: its process has failed or refused the task."""
    return reason.startswith((f"{Status.FAILED}: ", f"{Status.REFUSED}: "))
