"""Tests of `fedbio embed` that is killed, stopped, or out of disk: real processes, real limits."""

from __future__ import annotations

import functools
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbio.encoder import embed_file, room
from fedbio.encoder.pooling import Pooling
from fedbio.errors import MachineError
from fedbio.weights import Weights, write_weights

from .conftest import TINY, WriteFasta

embed = functools.partial(embed_file, threads=1, dtype="float32")
COMMAND = [sys.executable, "-c", "from fedbio.cli import entry; entry()", "embed"]
SETTINGS = ["--threads", "1", "--dtype", "float32", "--batch-residues", "100"]


@pytest.fixture
def tiny(tmp_path: Path, tiny_weights: Weights) -> Path:
    write_weights(tmp_path / "tiny", TINY, tiny_weights)
    return tmp_path / "tiny"


SHARD_PER_PACK = """
import sys
from fedbio.embeddings import Parts
from fedbio.encoder import embed_file, room
Parts.SHARD_SECONDS = 0.0
options = {"encoder": sys.argv[3], "pooling": sys.argv[4], "batch_residues": 100, "threads": 1, "dtype": "float32"}
embed_file(sys.argv[1], sys.argv[2], **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "pooling"), [(1, "ends"), pytest.param(6, "mean", marks=[pytest.mark.slow, pytest.mark.faults])]
)
def test_killed_at_any_moment_the_next_call_gives_the_bytes_of_an_unbroken_one(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, kills: int, pooling: Pooling
) -> None:
    source = write_fasta([20 + number % 7 for number in range(3000)])
    unbroken = functools.partial(embed, source, encoder=tiny, pooling=pooling, batch_residues=100)
    unbroken(tmp_path / "whole.h5")
    output, moments = tmp_path / "out.h5", random.Random(kills)
    done = 0
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", SHARD_PER_PACK, source, output, tiny, pooling])
        try:
            enough = len(list(tmp_path.glob("out.h5.parts/*.f32"))) + moments.randint(1, 60)
            while process.poll() is None and len(list(tmp_path.glob("out.h5.parts/*.f32"))) < enough:
                time.sleep(moments.uniform(0, 0.02))
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not output.exists()
        shards = len(list(tmp_path.glob("out.h5.parts/*.f32")))
        assert shards > done
        done = shards
    report = unbroken(output)
    assert report.resumed >= 3 * done  # packs of three or four proteins
    assert output.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("free_kib", [64, 150])
def test_on_a_full_disk_the_run_ends_clearly_and_goes_on_later(
    tiny: Path,
    write_fasta: WriteFasta,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_kib: int,
) -> None:
    # 12 KiB of residues, 21 of digests, 75 of vectors in a shard, and 240 in the finished file
    source = write_fasta([20] * 500 + [19] * 100)
    (small_disk / "ballast").write_bytes(bytes(2**20 - free_kib * 1024))
    with pytest.raises(MachineError, match=r"out\.h5: needs 0 MiB of disk .* are free there; free some space"):
        embed(source, small_disk / "out.h5", encoder=tiny)
    # as if another program filled the disk after the run had begun
    with monkeypatch.context() as patch:
        patch.setattr(room, "free_bytes", lambda folder: 2**40)
        with pytest.raises(MachineError, match=r"the disk is full; free some space and run the same command again"):
            embed(source, small_disk / "out.h5", encoder=tiny)
    assert not (small_disk / "out.h5").exists()
    (small_disk / "ballast").unlink()
    report = embed(source, small_disk / "out.h5", encoder=tiny)
    assert report.resumed == (0 if free_kib == 64 else 600)
    embed(source, tmp_path / "whole.h5", encoder=tiny)
    assert (small_disk / "out.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


SLOW_WRITE = """
import sys, time
from fedbio.encoder import embed_file, rows
blocks = rows.Assembly.blocks
def slow_blocks(assembly):
    for block in blocks(assembly):
        yield block
        time.sleep(0.05)
rows.Assembly.blocks = slow_blocks
embed_file(sys.argv[1], sys.argv[2], encoder=sys.argv[3], batch_residues=100, threads=1, dtype="float32")
"""


@pytest.mark.slow
def test_killed_in_the_final_write_nothing_is_computed_again_and_nothing_stays_behind(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source, output = write_fasta([20 + number % 7 for number in range(3000)]), tmp_path / "out.h5"
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITE, source, output, tiny])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.h5.*.part")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert len(list(tmp_path.glob(".out.h5.*.part"))) == 1
    report = embed(source, output, encoder=tiny, batch_residues=100)
    assert report.resumed == 3000
    embed(source, tmp_path / "whole.h5", encoder=tiny, batch_residues=100)
    assert output.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.h5", ".out.h5.lock", "whole.h5", ".whole.h5.lock", "proteins.fasta", "tiny",
    }  # fmt: skip


SAY_WHEN_COMPUTED = """
import pathlib, sys
from fedbio.cli import entry
from fedbio.embeddings import Parts
append = Parts.append
def append_and_say(parts, start, vectors):
    append(parts, start, vectors)
    parts.folder.with_name("computed").touch()
Parts.append = append_and_say
entry()
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_computed_and_a_second_process_is_told_of_the_first(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source, output = write_fasta([20 + number % 7 for number in range(10_000)]), tmp_path / "out.h5"
    command = [sys.executable, "-c", SAY_WHEN_COMPUTED, "embed", source, "-o", output, "--encoder", tiny, *SETTINGS]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "computed").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # it shall not be done before the second one has asked
        with pytest.raises(MachineError, match=rf"out\.h5 is in use by process {first.pid} "):
            embed(source, output, encoder=tiny)
    finally:
        first.send_signal(signal.SIGINT)
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "stopped; the same command goes on from here" in said
    # the 15 seconds after which a shard is written had not passed
    assert len(list((tmp_path / "out.h5.parts").glob("*.f32"))) >= 1


@pytest.mark.slow
def test_beyond_the_limit_of_a_files_size_the_run_ends_clearly_and_goes_on_later(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source, output = write_fasta([20] * 600), tmp_path / "out.h5"  # 75 KiB of vectors
    limit = 50 * 1024
    stopped = subprocess.run(
        [*COMMAND, source, "-o", output, "--encoder", tiny, *SETTINGS],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 2
    assert "the file may not grow so large; raise its limit (ulimit -f)" in stopped.stderr
    assert not output.exists()
    embed(source, output, encoder=tiny, batch_residues=100)
    embed(source, tmp_path / "whole.h5", encoder=tiny, batch_residues=100)
    assert output.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_an_output_whose_name_goes_on_keeps_its_files(tmp_path: Path) -> None:
    ours, other = tmp_path / ".proteins.77.78.part", tmp_path / ".proteins.h5.77.78.part"
    for path in (ours, other):
        path.touch()
    room.clear_leftovers(tmp_path / "proteins")
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
