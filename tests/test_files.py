"""Files appear whole or not at all; a second process is told who holds the lock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedbio.errors import MachineError
from fedbio.files import exclusive_lock, read_at, sha256_file, whole_file, write_whole


def test_whole_file_keeps_the_old_content_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    write_whole(target, "old")
    with pytest.raises(RuntimeError), whole_file(target) as beside:
        beside.write_text("half of the n")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_whole_file_keeps_the_old_content_when_the_disk_is_full(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    target = tmp_path / "table.csv"
    write_whole(target, "old")
    with (
        pytest.raises(MachineError, match=r"table\.csv: the disk is full; free some space"),
        whole_file(target) as beside,
    ):
        beside.symlink_to(full)
        beside.write_text("new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_whole_file_leaves_nothing_when_the_file_size_limit_is_hit(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from fedbio.files import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_whole(sys.argv[1], b'x' * 5000)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert result.returncode == 1
    assert os.listdir(tmp_path) == []


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_exclusive_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from fedbio.files import exclusive_lock\n"
        "with exclusive_lock(sys.argv[1], 'the store'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(MachineError, match=f"the store is in use by process {holder.pid} "),
            exclusive_lock(tmp_path / "lock", "the store"),
        ):
            pass
        holder.kill()
    with exclusive_lock(tmp_path / "lock", "the store"):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_exclusive_lock_waits_for_the_other_process_if_asked(tmp_path: Path) -> None:
    code = (
        "import sys; from fedbio.files import exclusive_lock\n"
        "with exclusive_lock(sys.argv[1], 'the store'):\n"
        "    print('held', flush=True); sys.stdin.read(); print('free', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        threading.Timer(0.2, holder.stdin.close).start()
        with exclusive_lock(tmp_path / "lock", "the store", wait=True):
            assert holder.stdout.readline() == "free\n"
            assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_reading_at_an_offset_neither_uses_nor_moves_the_position(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb", buffering=0) as file:
        file.seek(50)
        into = bytearray(10)
        read_at(file.fileno(), memoryview(into), 7)
        assert into == bytes(range(7, 17))
        assert file.tell() == 50
        with pytest.raises(EOFError, match="the file ends before"):
            read_at(file.fileno(), memoryview(into), 95)
