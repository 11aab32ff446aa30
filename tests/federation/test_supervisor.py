"""Real processes: relayed, blamed, ended."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedbio.errors import FedbioError, InputError
from fedbio.federation.supervisor import Process, supervise

SLEEPS = "import time; print('waiting', flush=True); time.sleep(60)"


def process(tmp_path: Path, name: str, code: str) -> Process:
    return Process(name, [sys.executable, "-c", code], tmp_path / f"{name}.txt")


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_lines_are_relayed_with_the_name_and_logged(tmp_path: Path) -> None:
    stream = io.StringIO()
    supervise(
        [process(tmp_path, "a", "print('one\\ntwo')"), process(tmp_path, "b", "print('three', end='')")],
        os.environ,
        stream,
    )
    assert sorted(stream.getvalue().splitlines()) == ["a | one", "a | two", "b | three"]
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"


@pytest.mark.slow
def test_failure_ends_all_and_names_the_culprit_not_those_who_lost_it(tmp_path: Path) -> None:
    lost = "import sys, time; time.sleep(0.2); print('lost my peer'); sys.exit(3)"
    wrong = "import sys, time; time.sleep(0.5); print('bad label'); sys.exit(2)"
    parties = [
        process(tmp_path, "site-1", lost),
        process(tmp_path, "site-2", wrong),
        process(tmp_path, "server", SLEEPS),
    ]
    with pytest.raises(InputError, match=r"site-2 ended with exit code 2(.|\n)*bad label"):
        supervise(parties, os.environ, io.StringIO())
    assert all(each.popen is not None and each.popen.poll() is not None for each in parties)


@pytest.mark.slow
def test_killed_child_is_named_with_its_signal(tmp_path: Path) -> None:
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(FedbioError, match="site-1 was killed by SIGKILL") as caught:
        supervise(
            [process(tmp_path, "site-1", suicide), process(tmp_path, "server", SLEEPS)], os.environ, io.StringIO()
        )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_children_die_with_their_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom fedbio.federation.supervisor import Process, supervise\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "supervise([Process('a', [sys.executable, '-c', child],"
        f" Path({str(tmp_path / 'a.txt')!r}))], os.environ)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    pid = int(parent.stderr.readline().removeprefix("a | "))
    assert is_alive(pid)
    parent.send_signal(number)
    parent.wait(10)
    parent.stderr.close()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
