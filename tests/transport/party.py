"""One end of a transfer as a process of its own: ``python party.py ROLE TASK ADDRESS KITS FOLDER [SOURCE]``.

ROLE is ``server`` or ``site``, TASK a function below. Lines on standard output tell how far it is; the last one of a
task that measures is JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from fedbio.errors import RefusedError, TransportError
from fedbio.transport import (
    BlobPayload,
    ConsumerSink,
    Credentials,
    FilePayload,
    FileSink,
    MemorySink,
    ObjectPayload,
    ObjectSink,
    Payload,
    Received,
    ServerEndpoint,
    SiteEndpoint,
)

MIB = 1 << 20
ITEM = 64 * MIB
ITEMS = 6
BLOB_BYTES = 256 * MIB


class Party:
    """A server or a site with gRPC and certificates."""

    def __init__(self, role: str, address: str, kits: Path, folder: Path) -> None:
        self.folder = folder
        self.done = threading.Event()
        self.running = blake3()
        sinks: dict[str, Callable[[Any], Any]] = {
            "file": lambda opening: FileSink(folder / "arrived", opening),
            "stream": lambda opening: ConsumerSink(self.running.update),
            "objects": lambda opening: ObjectSink(self._eat),
            "model": lambda opening: MemorySink(opening.size),
        }
        options: dict[str, Any] = {"spool": folder / "spool", "on_message": self._take, "sinks": sinks}
        self.endpoint: ServerEndpoint | SiteEndpoint
        if role == "server":
            self.endpoint = ServerEndpoint(address, Credentials.from_kit(kits / "server"), **options).start()
            say(f"up {self.endpoint.address}")
        else:
            say("up")
            self.endpoint = SiteEndpoint(address, Credentials.from_kit(kits / "site-1"), **options).start()

    def send(self, topic: str, payload: Payload | None = None) -> None:
        """Send to the other end, whichever process that is."""
        if isinstance(self.endpoint, SiteEndpoint):
            self.endpoint.send(topic, b"", payload)
            return
        while "site-1" not in self.endpoint.peers():
            time.sleep(0.01)
        self.endpoint.send("site-1", topic, b"", payload)

    def _eat(self, name: str, array: np.ndarray[Any, Any]) -> None:
        assert int(array[-1]) == int(name), (name, array)

    def _take(self, message: Received) -> None:
        if message.topic != "note":
            say("whole")
            self.done.set()


def say(line: str) -> None:
    print(line, flush=True)


def memory(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) << 10


def send(party: Party, source: Path) -> None:
    """Send a file until it has arrived, whatever happens to the other end."""
    while True:
        try:
            party.send("file", FilePayload(source))
            break
        except RefusedError:
            raise
        except TransportError as error:
            say(f"again {error}")
            time.sleep(0.05)
    say("sent")


def send_once(party: Party, source: Path) -> None:
    """Send a file and say what came of it."""
    try:
        party.send("file", FilePayload(source))
        say("sent")
    except TransportError as error:
        say(f"failed {error}")


def receive(party: Party, source: Path) -> None:
    """Take files until the process is ended."""
    threading.Event().wait()


def receive_small(party: Party, source: Path) -> None:
    """Take files on a disk on which none may be larger than 20 MiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB, 20 * MIB))
    threading.Event().wait()


def _items() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for number in range(ITEMS):
        yield str(number), np.full(ITEM, number, np.uint8)


def measured(party: Party, work: Callable[[], object]) -> None:
    """Say by how much the work has made the process grow at most."""
    party.send("note")
    before = memory("VmRSS")
    work()
    say(json.dumps({"grown": memory("VmHWM") - before}))


def send_file(party: Party, source: Path) -> None:
    measured(party, lambda: party.send("file", FilePayload(source)))


def send_objects(party: Party, source: Path) -> None:
    measured(party, lambda: party.send("objects", ObjectPayload(_items())))


def send_blob(party: Party, source: Path) -> None:
    content = np.ones(BLOB_BYTES, np.uint8)
    measured(party, lambda: party.send("model", BlobPayload(content.data)))


def take(party: Party, source: Path) -> None:
    measured(party, party.done.wait)


TASKS = (send, send_once, receive, receive_small, send_file, send_objects, send_blob, take)

if __name__ == "__main__":
    role, task, address, kits, folder, source = sys.argv[1:7]
    chosen = {one.__name__: one for one in TASKS}[task]
    party = Party(role, address, Path(kits), Path(folder))
    chosen(party, Path(source))
    party.endpoint.close()
