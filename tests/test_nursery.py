"""Scripts that run in a nursery are processes of their own, and end as others do."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbio.nursery import nursery, nursery_command, preloadable


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nursery(["numpy"], tmp_path_factory.mktemp("nursery") / "log.txt", threads=1) as found:
        yield found


THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start(path: str, folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(script)
    return subprocess.Popen(
        nursery_command(path, str(folder / "script.py"), arguments),
        cwd=folder,
        env={**os.environ, **THREADS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


ABOUT = """
import os, sys
print("numpy" in sys.modules and "fedbio.client" in sys.modules, __name__)
print(sys.argv[1:], os.environ["OF_THIS_SITE"], os.getcwd() == sys.path[0] == os.path.dirname(__file__))
print(os.getsid(0) == os.getpid())
sys.exit(7)
"""


def test_a_script_has_its_libraries_its_arguments_its_environment_and_its_exit_code(path: str, tmp_path: Path) -> None:
    process = start(path, tmp_path, ABOUT, "--epochs", "3", OF_THIS_SITE="site-1")
    assert process.communicate(timeout=60)[0].splitlines() == [
        "True __main__",
        "['--epochs', '3'] site-1 True",
        "True",
    ]
    assert process.returncode == 7


def test_a_script_that_fails_shows_its_own_lines_and_none_of_the_nursery_s(path: str, tmp_path: Path) -> None:
    process = start(path, tmp_path, "def of_mine():\n    raise ValueError('no such column')\n\nof_mine()\n")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert said.endswith("ValueError: no such column\n")
    assert "in of_mine" in said
    assert "nursery.py" not in said


def test_random_numbers_that_nobody_has_seeded_differ_between_scripts(path: str, tmp_path: Path) -> None:
    draw = "import random, numpy\nprint(random.random(), numpy.random.random())\n"
    folders = [tmp_path / "a", tmp_path / "b"]
    for each in folders:
        each.mkdir()
    one, other = (start(path, each, draw).communicate(timeout=60)[0].split() for each in folders)
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_a_script_can_start_processes_with_its_own_functions(path: str, tmp_path: Path) -> None:
    script = """
import multiprocessing

def double(number):
    return 2 * number

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 2]))
"""
    assert start(path, tmp_path, script).communicate(timeout=60)[0] == "[2, 4]\n"


WAIT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_who_stands_for_a_script_and_is_killed_takes_it_along_with_all_that_it_has_started(
    path: str, tmp_path: Path
) -> None:
    process = start(path, tmp_path, f"import os\nprint(os.getpid(), flush=True){WAIT}")
    assert process.stdout is not None
    script, child = int(process.stdout.readline()), int(process.stdout.readline())
    process.kill()
    assert ended(script)
    assert ended(child)
    process.communicate()


def test_sigterm_reaches_the_script_and_its_signal_is_seen(path: str, tmp_path: Path) -> None:
    process = start(path, tmp_path, WAIT)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
    assert ended(child)
    process.communicate()


def test_a_script_whose_libraries_shall_hear_other_things_runs_by_itself(path: str, tmp_path: Path) -> None:
    process = start(path, tmp_path, "import sys\nprint('numpy' in sys.modules)\n", OMP_NUM_THREADS="3")
    assert process.communicate(timeout=60)[0] == "False\n"


def test_without_a_nursery_a_script_runs_by_itself(tmp_path: Path) -> None:
    process = start(str(tmp_path / "nobody"), tmp_path, "import sys\nprint('numpy' in sys.modules)\nsys.exit(3)\n")
    assert process.communicate(timeout=60)[0] == "False\n"
    assert process.returncode == 3


def test_scripts_end_with_their_nursery(tmp_path: Path) -> None:
    with nursery([], tmp_path / "log.txt", threads=1) as path:
        process = start(path, tmp_path, WAIT)
        assert process.stdout is not None
        process.stdout.readline()
    assert process.wait(20) == -signal.SIGKILL
    process.communicate()


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("import torch.nn as nn\nfrom sklearn.svm import SVC\n", ["sklearn", "torch"]),
        ("def load():\n    import torch\n", []),
        ("import torchvision\n", []),
        ("import os\nos.environ['OMP_NUM_THREADS'] = '2'\nimport torch\n", None),
    ],
)
def test_what_a_script_finds_loaded_is_what_it_imports_first_of_all(script: str, found: list[str] | None) -> None:
    assert preloadable([script]) == found
