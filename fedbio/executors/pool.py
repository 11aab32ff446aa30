"""Get a process ready that plays many sites."""

from __future__ import annotations

__all__ = ["prepare"]

from collections.abc import Collection

from fedbio.client.turns import take_turns
from fedbio.executors import load_libraries


def prepare(workflows: Collection[str]) -> None:
    """Import what tasks of these workflows need, and let the sites' scripts take turns."""
    take_turns()
    load_libraries(workflows)
