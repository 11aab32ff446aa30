"""Tests of several processes on one file: real ones, on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbio.embeddings import Parts
from fedbio.encoder import embed_file
from fedbio.encoder.source import Source
from fedbio.encoder.work import Work
from fedbio.encoder.workers import choose_devices, share_out
from fedbio.errors import MachineError, SettingsError
from fedbio.results import EncoderInfo
from fedbio.weights import Weights, write_weights

from .conftest import TINY, WriteFasta

INFO = EncoderInfo("tiny", "0" * 64, True, 32, "mean", 2, "float32", 32, "window")


@pytest.fixture
def tiny(tmp_path: Path, tiny_weights: Weights) -> Path:
    write_weights(tmp_path / "tiny", TINY, tiny_weights)
    return tmp_path / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["ends", pytest.param("residues", marks=pytest.mark.slow)])
def test_two_processes_make_the_bytes_of_one(tiny: Path, write_fasta: WriteFasta, tmp_path: Path, pooling: str) -> None:
    source = write_fasta([20 + number % 60 for number in range(300)])
    reports = []
    for device, name in (("cpu", "one.h5"), ("cpu,cpu", "two.h5")):
        reports.append(
            embed_file(
                source,
                tmp_path / name,
                encoder=tiny,
                device=device,
                dtype="float32",
                threads=1,
                pooling=pooling,  # type: ignore[arg-type]
                batch_residues=200,
            )
        )
    assert reports[0].encoder == reports[1].encoder
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "one.h5", "two.h5", "proteins.fasta", "tiny",
    }  # fmt: skip


def test_shares_are_whole_packs_of_like_residues_and_leave_out_what_is_there(
    write_fasta: WriteFasta, tmp_path: Path
) -> None:
    source = write_fasta([20 + number % 60 for number in range(300)])
    with Source(source, tmp_path) as proteins:
        work = Work(proteins.distinct, INFO, budget=200)
        parts = Parts(tmp_path / "out.h5", info=INFO, work="w", rows=work.rows)
        packs = list(work.block(0).packs())
        shares = share_out(work, parts, 3)
        borders = {0, *(stop for _, _, stop, _ in packs)}
        assert [first for first, _ in shares] == [0, *(last for _, last in shares[:-1])]
        assert shares[-1][1] == work.rows
        assert borders.issuperset(last for _, last in shares)
        loads = [sum(seen for _, start, _, seen in packs if first <= start < last) for first, last in shares]
        assert max(loads) - min(loads) < 400
        # a first half that is there is shared out to nobody's cost
        parts.append(0, np.zeros((packs[len(packs) // 2][2], 32), dtype=np.float32))
        parts.flush()
        (_, last), (_, _) = share_out(work, parts, 2)
        rest = [seen for _, start, _, seen in packs if start >= last]
        assert sum(rest) == pytest.approx(sum(seen for _, _, _, seen in packs) / 4, rel=0.1)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_devices("cpu", 10**9) == ["cpu"]
    assert choose_devices("cuda:0, cuda:1", 5) == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_devices("auto", 10**9) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert choose_devices("auto", 50_000_000) == ["cuda:0", "cuda:1"]
    assert choose_devices("auto", 1000) == ["cuda:0"]
    for wrong in ("cuda:0,", "auto,cpu"):
        with pytest.raises(SettingsError, match="expected one device, or several like cuda:0,cuda:1"):
            choose_devices(wrong, 1)


@pytest.mark.slow
def test_a_worker_that_cannot_compute_ends_the_run_with_its_words(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path
) -> None:
    # the first device is the CPU's, the other one does not exist: only its worker finds out
    with pytest.raises(MachineError, match=r"the process for device cuda:77 says: device 'cuda:77': this machine has"):
        embed_file(write_fasta([20] * 100), tmp_path / "out.h5", encoder=tiny, device="cpu,cuda:77", dtype="float32")
    assert embed_file(tmp_path / "proteins.fasta", tmp_path / "out.h5", encoder=tiny, dtype="float32").proteins == 100


TWO_WORKERS = """
import sys
from fedbio.encoder import embed_file
embed_file(sys.argv[1], sys.argv[2], encoder=sys.argv[3], batch_residues=100, dtype="float32", device="cpu,cpu")
"""


def children(parent: int) -> list[int]:
    """Process ids of what a process has started."""
    try:
        return [int(each) for each in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def begun_workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Wait until both workers are there."""
    deadline = time.monotonic() + 60
    while len(workers := children(process.pid)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers) == 2
    return workers


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_worker_that_is_killed_stops_the_others_at_once(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, killed: int
) -> None:
    source, output = write_fasta([20 + number % 7 for number in range(20_000)]), tmp_path / "out.h5"
    with subprocess.Popen([sys.executable, "-c", TWO_WORKERS, source, output, tiny], stderr=subprocess.PIPE) as process:
        workers = begun_workers(process)
        os.kill(workers[killed], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert b"ended with code -9; run the same command again, what is finished is kept" in error
    assert [each for each in workers if is_alive(each)] == []
    report = embed_file(source, output, encoder=tiny, batch_residues=100, dtype="float32")
    # had the other one not been stopped, at least its half would be there
    assert report.resumed < 9_000
    embed_file(source, tmp_path / "whole.h5", encoder=tiny, batch_residues=100, dtype="float32")
    assert output.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_the_process_that_started_them(
    tiny: Path, write_fasta: WriteFasta, tmp_path: Path, signal_number: signal.Signals
) -> None:
    source = write_fasta([20 + number % 7 for number in range(20_000)])
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_WORKERS, source, tmp_path / "out.h5", tiny], stderr=subprocess.DEVNULL
    )
    try:
        workers = begun_workers(process)
    finally:
        process.send_signal(signal_number)
        process.wait(60)
    deadline = time.monotonic() + 30
    while any(is_alive(each) for each in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [each for each in workers if is_alive(each)] == []


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits to be counted does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
