"""Files that go on after both ends were killed, and what their processes take of memory and disk meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import TransportError
from fedbio.transport import (
    BytesPayload,
    Credentials,
    FilePayload,
    FileSink,
    Limits,
    Opening,
    Received,
    ServerEndpoint,
    SiteEndpoint,
    spool,
)
from fedbio.transport.sinks import SpooledFileSink

from . import party
from .conftest import Inbox, eventually
from .proxy import DOWN, UP, Proxy

MIB = 1 << 20
WINDOW_BYTES = Limits().window_chunks * MIB
AGAIN_BYTES = WINDOW_BYTES + (256 << 10)
"""What may be sent twice after a kill: what the receiver has not stored, at most a window; and a handshake."""


class Process:
    """One end as a process, which can be killed and started again."""

    def __init__(self, *arguments: object) -> None:
        self._arguments = [str(argument) for argument in arguments]
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, party.__file__, *self._arguments], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()
        while not self.line().startswith("up"):
            pass

    def line(self, within_s: float = 120.0) -> str:
        """Return the next line that it says."""
        return self.lines.get(timeout=within_s)

    def wait_for(self, beginning: str) -> str:
        while not (line := self.line()).startswith(beginning):
            pass
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.lines.put(line.strip())


@pytest.fixture
def parties(kits: Path, tmp_path: Path, free_port: int) -> Iterator[Callable[..., tuple[Process, Process, Proxy]]]:
    """Start a sender and a receiver with a proxy between them, the server first."""
    started: list[Any] = []

    def start(sends: str, takes: str, source: Path, direction: str = UP) -> tuple[Process, Process, Proxy]:
        address = f"127.0.0.1:{free_port}"
        proxy = Proxy(address)
        started.append(proxy)
        tasks = {"site": sends, "server": takes} if direction == UP else {"server": sends, "site": takes}
        ends = {}
        for role in ("server", "site"):
            where = address if role == "server" else proxy.address
            ends[role] = Process(role, tasks[role], where, kits, tmp_path / role, source)
            started.append(ends[role])
        return (ends["site"], ends["server"], proxy) if direction == UP else (ends["server"], ends["site"], proxy)

    yield start
    for one in reversed(started):
        one.kill() if isinstance(one, Process) else one.close()


def random_file(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", one, other], check=False).returncode == 0


def killed_again_and_again(
    parties: Callable[..., tuple[Process, Process, Proxy]],
    folder: Path,
    direction: str,
    kills: int,
    size: int,
    most_s: float,
    bytes_per_s: float,
) -> int:
    """Kill either end at random moments until the file is there; return how many bytes were sent twice, in all."""
    dice = random.Random(kills)
    arrived = folder / ("server" if direction == UP else "site") / "arrived"
    source = random_file(folder / "source", size)
    sender, receiver, proxy = parties("send", "receive", source, direction)
    proxy.bytes_per_s = bytes_per_s
    done, files = 0, 1
    while True:
        with contextlib.suppress(queue.Empty):
            deadline = time.monotonic() + dice.uniform(0.0, most_s) if done < kills else float("inf")
            while (line := sender.line(max(0.0, min(deadline - time.monotonic(), 200.0)))) != "sent":
                assert line.startswith("again"), line
            assert same(source, arrived)
            if done == kills:
                break
            # the next one, so that there is always something under way
            files += 1
            sender.kill()
            random_file(source, size, files)
            sender.start()
            continue
        done += 1
        one = dice.choice([sender, receiver])
        one.kill()
        one.start()
    assert [path.name for path in arrived.parent.iterdir() if path.suffix == ".part"] == []
    return proxy.passed[direction] - files * size


@pytest.mark.slow
@pytest.mark.parametrize("direction", [UP, pytest.param(DOWN, marks=[pytest.mark.slow, pytest.mark.faults])])
def test_file_goes_on_after_either_end_was_killed(
    parties: Callable[..., tuple[Process, Process, Proxy]], tmp_path: Path, direction: str
) -> None:
    size = 40 * MIB + 12_345
    again = killed_again_and_again(parties, tmp_path, direction, 4, size, most_s=1.0, bytes_per_s=20e6)
    assert again < 0.01 * size + 4 * AGAIN_BYTES


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_file_goes_on_after_twenty_five_kills_at_random_moments(
    parties: Callable[..., tuple[Process, Process, Proxy]],
    tmp_path: Path,
    direction: str,
    record_property: Callable[[str, object], None],
) -> None:
    size = 128 * MIB + 1
    again = killed_again_and_again(parties, tmp_path, direction, 25, size, most_s=1.5, bytes_per_s=30e6)
    record_property("bytes sent twice", again)
    print(f"{direction}: {again / MIB:.1f} MiB sent twice over 25 kills")
    assert again < 0.02 * size + 25 * AGAIN_BYTES


class Pair:
    """A server and a site in this process; what they have half-received is found again by its name alone."""

    def __init__(self, kits: Path, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "arrived"
        self.inbox = Inbox()
        self.server = ServerEndpoint(
            "127.0.0.1:0",
            Credentials.from_kit(kits / "server"),
            spool=folder / "spool",
            on_message=self.inbox,
            sinks={"file": lambda opening: FileSink(self.target, opening)},
            limits=Limits(memory_bytes=MIB),
        ).start()
        self.proxy = Proxy(self.server.address)
        self.site = SiteEndpoint(
            self.proxy.address, Credentials.from_kit(kits / "site-1"), spool=folder / "site", on_message=print
        ).start()

    def leave(self, content: bytes, payload: FilePayload) -> None:
        """Put down what an earlier process would have left of a file."""
        opening = Opening("site-1", "file", b"", "file", payload.size, payload.transfer())
        sink = FileSink(self.target, opening)
        sink.write(memoryview(content))
        sink.suspend()

    def close(self) -> None:
        self.site.close()
        self.server.close()
        self.proxy.close()


@pytest.fixture
def pair(kits: Path, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(kits, tmp_path)
    yield made
    made.close()


SIZE = 12 * MIB + 500
CONTENT = np.random.default_rng(9).bytes(SIZE)
DAMAGED = CONTENT[:3_000_000] + b"?" + CONTENT[3_000_001:]


@pytest.mark.parametrize(
    ("there", "sent"),
    [
        (CONTENT[: 7 * MIB], 5 * MIB),
        (CONTENT[: 7 * MIB - 1], 6 * MIB),
        (CONTENT, MIB),
        (CONTENT + b"more", MIB),
        (CONTENT[:1_000], 12 * MIB),
        (b"", 12 * MIB),
        (DAMAGED[: 7 * MIB], 12 * MIB),
        (DAMAGED, 12 * MIB),
        (bytes(7 * MIB), 12 * MIB),
    ],
    ids=["half", "cut short", "all", "too long", "less than a chunk", "empty", "tampered", "tampered all", "zeros"],
)
def test_beginning_that_is_there_is_not_sent_again_if_it_is_right(pair: Pair, there: bytes, sent: int) -> None:
    source = pair.folder / "source"
    source.write_bytes(CONTENT)
    payload = FilePayload(source)
    pair.leave(there, payload)
    before = pair.proxy.passed[UP]
    pair.site.send("file", b"", payload)
    passed = pair.proxy.passed[UP] - before
    assert pair.target.read_bytes() == CONTENT
    assert passed < sent + MIB
    assert not list(pair.folder.glob(".arrived*"))


@pytest.mark.parametrize("disguised", [True, False], ids=["same times", "new times"])
def test_source_that_changed_between_two_attempts_is_sent_as_it_is_now(pair: Pair, disguised: bool) -> None:
    source = pair.folder / "source"
    source.write_bytes(CONTENT)
    state = source.stat()
    pair.leave(CONTENT[: 7 * MIB], FilePayload(source))
    with open(source, "r+b") as file:
        file.write(DAMAGED)
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns if disguised else state.st_mtime_ns + 1))
    pair.site.send("file", b"", FilePayload(source))
    assert pair.target.read_bytes() == DAMAGED


def test_source_that_shrinks_while_it_is_sent_is_told_and_not_delivered(pair: Pair) -> None:
    source = pair.folder / "source"
    source.write_bytes(CONTENT)
    payload = FilePayload(source)
    os.truncate(source, SIZE // 2)
    with pytest.raises(Exception, match="shorter than when sending began; send it again"):
        pair.site.send("file", b"", payload)
    source.write_bytes(CONTENT)
    pair.site.send("file", b"", FilePayload(source))
    assert pair.target.read_bytes() == CONTENT


def test_cancelled_file_goes_on_when_it_is_sent_again(pair: Pair) -> None:
    source = pair.folder / "source"
    source.write_bytes(CONTENT)
    pair.proxy.bytes_per_s = 10e6
    with pytest.raises(TransportError, match="no acknowledgement within the time given"):
        pair.site.send("file", b"", FilePayload(source), timeout_s=0.8)
    pair.proxy.bytes_per_s = None
    eventually(lambda: not pair.server._peers["site-1"].session._receiver._streams)
    before = pair.proxy.passed[UP]
    pair.site.send("file", b"", FilePayload(source))
    assert pair.proxy.passed[UP] - before < 10 * MIB
    assert pair.target.read_bytes() == CONTENT


@pytest.mark.parametrize("topic", ["file", "spooled"])
def test_same_file_sent_twice_at_once_arrives_twice(pair: Pair, topic: str) -> None:
    source = pair.folder / "source"
    source.write_bytes(CONTENT)
    threads = [
        threading.Thread(target=lambda: pair.site.send(topic, b"", FilePayload(source), timeout_s=30)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for message in pair.inbox.wait(3):
        assert isinstance(message, Received)
        arrived = message.payload.read_bytes() if topic == "file" else bytes(message.payload.content)
        assert arrived == CONTENT


def test_disk_that_fills_up_while_a_payload_arrives_is_told_to_its_sender(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pair.folder / "source"
    source.write_bytes(CONTENT)
    written = 0

    def fill(descriptor: int, chunk: memoryview) -> None:
        nonlocal written
        written += len(chunk)
        if written > 5 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.write(descriptor, chunk)

    monkeypatch.setattr(spool, "_write_all", fill)
    for topic, payload in (
        ("file", FilePayload(source)),
        ("spooled", FilePayload(source)),
        ("bytes", BytesPayload([CONTENT])),
    ):
        written = 0
        with pytest.raises(TransportError, match=r"not accepted: cannot be stored: No space left on device"):
            pair.site.send(topic, b"", payload)
    monkeypatch.undo()
    assert not list(pair.folder.rglob("*.part"))
    pair.site.send("file", b"", FilePayload(source))
    assert pair.target.read_bytes() == CONTENT


def test_half_received_files_in_the_spool_are_capped(pair: Pair) -> None:
    for number in range(12):
        opening = Opening("site-1", "spooled", b"", "file", 3 * MIB, bytes([number]) * 32)
        sink = SpooledFileSink(pair.folder / "spool", opening, 8)
        sink.write(memoryview(bytes(MIB)))
        sink.suspend()
    assert len(list((pair.folder / "spool").glob("*.part"))) == 8


@pytest.mark.slow
@pytest.mark.faults
def test_file_that_the_disk_does_not_take_is_told_to_its_sender(
    parties: Callable[..., tuple[Process, Process, Proxy]], tmp_path: Path
) -> None:
    sender, _, _ = parties("send_once", "receive_small", random_file(tmp_path / "source", 40 * MIB))
    assert sender.line() == (
        f"failed server {sender._arguments[2]}: file was not accepted: cannot be stored: File too large"
    )
    assert list((tmp_path / "server").glob("*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sends", "most_sending", "most_taking"),
    [
        ("send_file", 64 * MIB, 64 * MIB),
        ("send_objects", party.ITEM + 64 * MIB, party.ITEM + 64 * MIB),
        ("send_blob", 64 * MIB, party.BLOB_BYTES + 64 * MIB),
    ],
)
def test_processes_grow_by_no_more_than_was_promised(
    parties: Callable[..., tuple[Process, Process, Proxy]],
    tmp_path: Path,
    sends: str,
    most_sending: int,
    most_taking: int,
    record_property: Callable[[str, object], None],
) -> None:
    source = random_file(tmp_path / "source", 512 * MIB if sends == "send_file" else 0)
    sender, receiver, _ = parties(sends, "take", source)
    grown = [json.loads(end.wait_for("{"))["grown"] for end in (sender, receiver)]
    record_property("growth in bytes", grown)
    print(f"{sends}: sender {grown[0] / MIB:.1f} MiB, receiver {grown[1] / MIB:.1f} MiB")
    assert grown[0] < most_sending
    assert grown[1] < most_taking
    shutil.rmtree(tmp_path / "server", ignore_errors=True)
