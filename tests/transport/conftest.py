"""Real certificates for a federation of two sites, and a second federation whose certificates are foreign."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbio.provision import provision
from fedbio.settings import FederationFile
from fedbio.transport import Credentials


def make_kits(folder: Path, federation: str = "demo") -> Path:
    settings = {"address": "localhost:8443", "also": ["127.0.0.1"]}
    provision(FederationFile(federation=federation, server=settings, sites=["site-1", "site-2"]), folder)
    return folder


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"))


@pytest.fixture(scope="session")
def foreign_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("foreign"), "other")


@pytest.fixture
def credentials(kits: Path) -> Callable[[str], Credentials]:
    return lambda party: Credentials.from_kit(kits / party)


class Inbox:
    """Collects what a callback is called with, and waits until there is enough of it."""

    def __init__(self) -> None:
        self.items: list[object] = []
        self._changed = threading.Condition()

    def __call__(self, *item: object) -> None:
        with self._changed:
            self.items.append(item[0] if len(item) == 1 else item)
            self._changed.notify_all()

    def wait(self, count: int = 1, within_s: float = 10.0) -> list[object]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.items) >= count, within_s), self.items
            return self.items[:count]


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Every thread of ours ends soon after its test."""
    yield
    ours = ("server", "site-", "fedbio-")
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith(ours)], 5.0)
