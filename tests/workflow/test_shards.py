"""A large file embedded in shards through Snakemake: the same as in one go, on a cluster too, and after kill -9."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from fedbio.encoder import embed_file
from fedbio.files import sha256_file

ROOT = Path(__file__).parents[2]
RESULT = Path("results/embeddings/embeddings.h5")

pytestmark = pytest.mark.slow


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start Snakemake in a group of its own, so that all of it can be killed; it writes to ``snakemake.out``."""
    command = [str(Path(sys.executable).parent / "snakemake"), "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(folder), "--configfile", "embeddings.yaml", *arguments]
    with open(folder / "snakemake.out", "wb") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)


def run_to_end(folder: Path, *arguments: str, expected: int = 0) -> str:
    process = snakemake(folder, *arguments)
    code = process.wait(timeout=280)
    output = (folder / "snakemake.out").read_text()
    assert code == expected, output
    return output


@pytest.fixture
def settings(small_encoder: Path) -> dict[str, object]:
    encoder = {"name": str(small_encoder), "dtype": "float32"}
    return {"party": "embeddings", "proteins": "proteins.fasta", "threads": 1, "device": "cpu", "encoder": encoder}


@pytest.fixture
def folder(tmp_path: Path, settings: dict[str, object]) -> Path:
    """A folder with proteins of many lengths, one of them twice, and settings for four shards."""
    random = np.random.default_rng(5)
    sequences = ["".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), n)) for n in random.integers(5, 300, 80)]
    sequences[70] = sequences[3]
    lines = (f">P{number} TARGET=Nucleus SET=train VALIDATION=False\n{text}\n" for number, text in enumerate(sequences))
    (tmp_path / "proteins.fasta").write_text("".join(lines))
    (tmp_path / "embeddings.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def read(path: Path) -> tuple[list[str], np.ndarray, dict[str, object]]:
    with h5py.File(path, "r") as file:
        return file["ids"].asstr()[:].tolist(), file["embeddings"][:], dict(file.attrs)


@pytest.fixture
def check_same(folder: Path, small_encoder: Path) -> Callable[[Path], None]:
    """Compare a result of shards with that of one run over the whole file."""

    def check(result: Path) -> None:
        whole = folder / "whole.h5"
        embed_file(folder / "proteins.fasta", whole, encoder=small_encoder, dtype="float32", device="cpu", threads=1)
        ids, vectors, attributes = read(result)
        expected_ids, expected, expected_attributes = read(whole)
        assert ids == expected_ids
        assert attributes == expected_attributes
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)

    return check


def test_four_jobs_at_once_equal_one_run(folder: Path, check_same: Callable[[Path], None]) -> None:
    output = run_to_end(folder, "--cores", "4", "--config", "shards=4")
    assert "embed_shard           4" in output
    check_same(folder / RESULT)
    # what is not needed any more is gone, and there is nothing left to do
    assert not list((folder / RESULT).parent.glob("shards/*.h5"))
    assert not list((folder / RESULT).parent.glob("shards/*.fasta"))
    assert "Nothing to be done" in run_to_end(folder, "--cores", "4", "--config", "shards=4")


def test_rows_of_an_earlier_file_are_taken_and_labels_reach_the_shards(
    folder: Path, settings: dict[str, object], small_encoder: Path
) -> None:
    earlier = folder / "earlier.h5"
    embed_file(folder / "proteins.fasta", earlier, encoder=small_encoder, dtype="float32", device="cpu", threads=1)
    with h5py.File(earlier, "r+") as file:
        # a mark that no encoder would leave
        file["embeddings"][[3, 70]] = 42.0
    proteins = (folder / "proteins.fasta").read_text()
    (folder / "proteins.fasta").write_text(">new\nMKV\n" + proteins)
    (folder / "labels.csv").write_text("id,target,set\nnew,Plastid,test\n")
    again = {**settings, "labels": "labels.csv", "embeddings": "earlier.h5"}
    (folder / "embeddings.yaml").write_text(yaml.safe_dump(again))
    run_to_end(folder, "--cores", "2", "--config", "shards=2", "--notemp")
    ids, vectors, _ = read(folder / RESULT)
    assert ids == ["new", *read(earlier)[0]]
    # P3, and the other protein of the same sequence
    assert np.flatnonzero((vectors == 42.0).all(axis=1)).tolist() == [4, 71]
    assert (folder / "results/embeddings/shards/1-of-2.fasta").read_text().startswith(">new TARGET=Plastid SET=test")


def test_more_shards_than_proteins_are_refused_by_the_first_job(folder: Path) -> None:
    output = run_to_end(folder, "--cores", "1", "--config", "shards=81", expected=1)
    assert "proteins.fasta: 80 proteins cannot make 81 shards; ask for 1 to 80" in output


def wait_for(there: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished_shards(folder: Path) -> int:
    """How many shards the last Snakemake says are finished."""
    return (folder / "snakemake.out").read_text().count("(Rule: embed_shard)")


def test_killed_at_any_moment_the_next_call_goes_on_to_the_same_bytes(folder: Path) -> None:
    run_to_end(folder, "--cores", "2", "--config", "shards=4", "run=unbroken")
    shards = folder / "results/embeddings/shards"

    # Snakemake alone is killed: the job that it has started goes on, and the next call waits for it
    first = snakemake(folder, "--cores", "1", "--config", "shards=4")
    wait_for(lambda: list(shards.glob(".*.h5.lock")), first)
    first.kill()
    first.wait()
    # all of it is killed, with a shard finished and others not
    second = snakemake(folder, "--cores", "1", "--config", "shards=4")
    wait_for(lambda: finished_shards(folder), second)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    assert not (folder / RESULT).exists()
    before = finished_shards(folder)

    output = run_to_end(folder, "--cores", "2", "--config", "shards=4")
    assert sha256_file(folder / RESULT) == sha256_file(folder / "results/unbroken/embeddings.h5")
    # no shard that was finished is computed again
    assert before + output.count("(Rule: embed_shard)") == 4


SUBMIT = """#!/bin/sh
# what a cluster's submit command does: note what was asked for, start the job somewhere, print its id
echo "$1" >> submitted.txt
sh "$2" > "job-$$.out" 2>&1 &
echo $$
"""


@pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_cluster_generic") is None,
    reason="needs snakemake-executor-plugin-cluster-generic",
)
def test_shards_as_cluster_jobs_equal_one_run(
    folder: Path, settings: dict[str, object], check_same: Callable[[Path], None]
) -> None:
    (folder / "submit").write_text(SUBMIT)
    # the jobs ask for a GPU; where there is none, auto takes the CPU
    (folder / "embeddings.yaml").write_text(yaml.safe_dump({**settings, "device": "auto"}))
    asked = "{rule} gpu={resources.gpu} mem_mb={resources.mem_mb} runtime={resources.runtime} threads={threads}"
    arguments = ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", f"sh submit '{asked}'"]
    arguments += ["--jobs", "4", "--default-resources", "gpu=0", "--resources", "gpu=4"]
    arguments += ["--seconds-between-status-checks", "1"]
    run_to_end(folder, *arguments, "--config", "shards=4")
    check_same(folder / RESULT)
    assert sorted((folder / "submitted.txt").read_text().splitlines()) == [
        *["embed_shard gpu=1 mem_mb=16000 runtime=240 threads=1"] * 4,
        "embeddings gpu=0 mem_mb=4000 runtime=120 threads=1",
        "shard_proteins gpu=0 mem_mb=4000 runtime=120 threads=1",
    ]


# a cluster of one node: jobs start at once, and their states are files
SLURM = {
    "sbatch": """#!{python}
import os, subprocess, sys
script = next(each.removeprefix("--wrap=") for each in sys.argv if each.startswith("--wrap="))
asked = [each for each in sys.argv[1:-1] if not each.startswith(("--wrap", "--comment", "--job-name", "--output"))]
with open("submitted.txt", "a") as file:
    print(*asked, file=file)
number = os.getpid()
state = f"slurm-states/{number}"
open(state, "w").write("RUNNING")
outcome = f"&& echo COMPLETED > {state} || echo FAILED > {state}"
subprocess.Popen(
    ["sh", "-c", f"({script}) {outcome}"],
    env={**os.environ, "SLURM_JOB_ID": str(number)},
    stdout=open(f"slurm-{number}.out", "w"),
    stderr=subprocess.STDOUT,
)
print(number)
""",
    "srun": """#!/bin/sh
while case "$1" in -*) true;; *) false;; esac; do shift; done
exec "$@"
""",
    "sacct": """#!/bin/sh
for state in slurm-states/*; do echo "$(basename "$state")|$(cat "$state")"; done
""",
    "sinfo": "#!/bin/sh\necho gpu\n",
    "sacctmgr": "#!/bin/sh\n",
    "sshare": "#!/bin/sh\n",
    "scontrol": "#!/bin/sh\n",
}


@pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None, reason="needs snakemake-executor-plugin-slurm"
)
def test_shards_through_the_profile_for_slurm_equal_one_run(
    folder: Path,
    settings: dict[str, object],
    check_same: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = folder / "bin"
    commands.mkdir()
    for name, script in SLURM.items():
        (commands / name).write_text(script.replace("{python}", sys.executable))
        (commands / name).chmod(0o755)
    (folder / "slurm-states").mkdir()
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    (folder / "embeddings.yaml").write_text(yaml.safe_dump({**settings, "device": "auto", "threads": 2}))
    arguments = ["--workflow-profile", str(ROOT / "profiles" / "slurm")]
    arguments += ["--seconds-between-status-checks", "1", "--slurm-init-seconds-before-status-checks", "1"]
    run_to_end(folder, *arguments, "--config", "shards=4")
    check_same(folder / RESULT)
    asked = (folder / "submitted.txt").read_text().splitlines()
    for words in ("--gpus=1", "--mem 16000", "-t 240", "--cpus-per-task=2"):
        assert sum(words in line for line in asked) == 4, asked
    assert sum("--mem 4000" in line and "--gpus" not in line for line in asked) == 2
