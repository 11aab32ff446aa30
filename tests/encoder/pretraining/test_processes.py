"""Tests with real processes: killed, interrupted, and several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedbio.weights import read_weights

from .conftest import Command, fedbio

LONG = ["--steps", "80", "--valid-every", "40", "--save-minutes", "1e-9", "--log-every", "1"]
"""A checkpoint after each update."""


def last_step(output: Path) -> int:
    """The newest checkpoint's step; 0 if there is none."""
    return max((int(path.stem[5:]) for path in output.glob("checkpoints/step-*.safetensors")), default=0)


def when(process: subprocess.Popen[str], condition: Callable[[], bool], number: int) -> None:
    """Send a signal as soon as a condition holds."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedbio", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(arguments: list[str]) -> str:
    done = fedbio([*arguments, "--json"])
    assert done.returncode == 0, done.stderr
    digest: str = json.loads(done.stdout.splitlines()[-1])["weights_sha256"]
    return digest


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(command: Command, tmp_path: Path) -> None:
    whole = finished(command(*LONG))
    output = tmp_path / "killed"
    call = command(*LONG, output="killed")
    moments: list[Callable[[], bool]] = [
        lambda: (output / ".corpus.part").exists() or (output / "corpus").exists(),
        lambda: last_step(output) >= 1,
        lambda: any(output.glob("checkpoints/.*.part")),
        lambda: last_step(output) >= 40,
    ]
    for moment in moments:
        process = start(call)
        when(process, moment, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert last_step(output) < 80
    assert finished(call) == whole
    curves = [json.loads((tmp_path / name / "training.json").read_text())["curve"] for name in ("out", "killed")]
    assert curves[0] == curves[1]
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps.count(0) == 1


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    call = command("--steps", "200", "--valid-every", "1000", "--log-every", "1")
    process = start(call)
    metrics = output / "metrics.jsonl"
    when(process, lambda: metrics.is_file() and metrics.read_text().count("\n") > 5, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped; the same command goes on from here" in errors
    stopped = last_step(output)
    assert stopped >= 5
    account = json.loads((output / "training.json").read_text())
    assert (account["step"], account["finished"]) == (stopped, False)
    assert read_weights(output)[0].trained
    if stopped < 200:
        done = fedbio(call)
        assert f"going on step={stopped} of 200" in done.stderr
        assert last_step(output) == 200


@pytest.mark.slow
def test_a_second_process_on_one_folder_is_refused(command: Command, tmp_path: Path) -> None:
    call = command("--steps", "5000", "--valid-every", "10000")
    process = start(call)
    try:
        while not (tmp_path / "out" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        second = fedbio(call)
        assert second.returncode == 2
        assert f"is in use by process {process.pid}" in second.stderr
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_processes_that_would_have_no_packs_are_refused(command: Command, free_port: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port)]
    call = [*torchrun, "-m", "fedbio", *command("--steps", "2", "--packs", "1")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "--packs 1: an update has fewer packs than there are processes (2)" in done.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(command: Command, tmp_path: Path, free_port: int) -> None:
    options = ["--steps", "12", "--packs", "4", "--average", "none"]
    assert fedbio(command(*options)).returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port)]
    call = [*torchrun, "-m", "fedbio", *command(*options, output="two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for more in (["--minutes", "1e-9"], []):  # stopped after an update, and gone on
        done = subprocess.run([*call, *more], capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
    accounts = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("out", "two")]
    assert [each["processes"] for each in accounts[1]["stretches"]] == [2, 2]
    assert [each["step"] for each in accounts[1]["stretches"]] == [0, 1]
    assert accounts[0]["tokens"] == accounts[1]["tokens"]
    for one, two in zip(accounts[0]["curve"], accounts[1]["curve"], strict=True):
        assert (one["step"], one["masked"], one["residues"]) == (two["step"], two["masked"], two["residues"])
        # sums in another order
        assert one["valid_loss"] == pytest.approx(two["valid_loss"], rel=1e-4)
    (_, alone), (_, together) = read_weights(tmp_path / "out"), read_weights(tmp_path / "two")
    for name, tensor in alone.items():
        np.testing.assert_allclose(together[name], tensor, atol=2e-3, err_msg=name)
