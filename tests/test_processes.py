"""Guards of processes: exit codes pass through, and nothing that was started outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbio.processes import KILL_ALL, guard_command


def start(program: str, socket: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen(guard_command([sys.executable, "-c", program], socket), start_new_session=True)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_guard_ends_as_its_command_did(program: str, code: int) -> None:
    assert start(program).wait(20) == code


def test_command_that_cannot_be_started_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert subprocess.run(guard_command(["/no/such/program"], "")).returncode == 127
    assert "/no/such/program: No such file or directory" in capfd.readouterr().err


def test_request_to_end_reaches_the_command(tmp_path: Path) -> None:
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    guard = start(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(ended)!r}).touch(), sys.exit(3)))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(1000)\n"
    )
    wait_until(ready.exists)
    guard.terminate()
    assert guard.wait(20) == 3
    assert ended.exists()


FAMILY = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
pathlib.Path({path!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
{last}
"""


@pytest.mark.parametrize("last", ["time.sleep(1000)", "os._exit(0)"])
def test_guard_leaves_nothing_behind(tmp_path: Path, last: str) -> None:
    path, socket = tmp_path / "pids", tmp_path / "folder/socket"
    socket.parent.mkdir()
    socket.touch()
    guard = start(FAMILY.format(path=str(path), last=last), str(socket))
    if last.startswith("time"):
        wait_until(lambda: path.exists() and path.read_text() != "")
        guard.send_signal(KILL_ALL)
    guard.wait(20)
    assert not any(is_alive(int(each)) for each in path.read_text().split())
    assert not socket.parent.exists()


def test_guard_and_all_end_when_whoever_started_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    program = FAMILY.format(path=str(path), last="time.sleep(1000)")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\nfrom fedbio.processes import guard_command\n"
            f"subprocess.Popen(guard_command([sys.executable, '-c', {program!r}], ''), start_new_session=True)\n"
            "time.sleep(1000)\n",
        ]
    )
    wait_until(lambda: path.exists() and path.read_text() != "")
    started = [int(each) for each in path.read_text().split()]
    assert all(map(is_alive, started))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(is_alive, started)))
