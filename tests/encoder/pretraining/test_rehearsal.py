"""The manual's way from proteins to an encoder to give away: its own commands, on the CPU with a tiny network."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedbio.embeddings import Embeddings
from fedbio.proteins import read

from .conftest import ARCHITECTURE, write_proteins
from .training_list import Banned, check_account, read_again, table_sequences

ROOT = Path(__file__).parents[3]

SMALL = {
    "fedbio pretrain": [*ARCHITECTURE, "--pack-tokens", "512", "--threads", "1", "--no-tensorboard"],
    "fedbio embed": ["--threads", "1"],
    "python benchmarks/scl_probe.py": ["--mlp", "8", "--rounds", "2", "--seeds", "0"],
}
"""What makes each command small."""

WORDS = {
    "1e9": "3e3",
    "cuda": "cpu",
    "110": "1e-9",  # every stretch is over after one update
    "python": sys.executable,
    "benchmarks/scl_probe.py": str(ROOT / "benchmarks" / "scl_probe.py"),
}
"""What a word of the manual becomes here."""


def commands() -> list[str]:
    """The commands of the manual's section, in order."""
    manual = (ROOT / "docs" / "pretraining.md").read_text()
    section = manual.split("## From proteins to an encoder to give away\n")[1].split("\n## ")[0]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [line.removeprefix("$ ") for line in block[1].splitlines()]


def made_small(command: str) -> str:
    """The same command for a tiny network."""
    more = [option for start, options in SMALL.items() if command.startswith(start) for option in options]
    if not more:
        return command
    return shlex.join([*(WORDS.get(word, word) for word in shlex.split(command)), *more])


def run(command: str, folder: Path) -> str:
    """Run a line in a shell, with the commands of this installation."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    # the probe ends with 1 if an encoder is worth nothing, as this one
    assert done.returncode == 0 or ("scl_probe" in command and done.returncode == 1), f"{command}\n{done.stderr}"
    return done.stdout


def write_data(folder: Path) -> None:
    """A corpus with two proteins of the test in it, held-out proteins, and a table in FLIP's form."""
    run("fedbio data demo -o demo.fasta --count 150", folder)
    proteins = list(read(folder / "demo.fasta"))
    with open(folder / "mixed_soft.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sequence", "target", "set", "validation"])
        writer.writerows((each.sequence, each.target, each.set, each.validation or "") for each in proteins)
    leaked = [each.sequence for each in proteins if each.set == "test"][:2]
    for name, lengths in (("corpus", [40] * 60), ("valid", [40] * 10)):
        text = write_proteins(folder / f"{name}.fasta", lengths, seed=len(name)).read_text()
        text += "".join(f">leaked{number}\n{each}\n" for number, each in enumerate(leaked)) * (name == "corpus")
        (folder / f"{name}.fasta").write_text(text)
        (folder / f"{name}.fasta.gz").write_bytes(gzip.compress(text.encode()))


@pytest.mark.slow
def test_the_manuals_commands_lead_from_proteins_to_a_measured_encoder(tmp_path: Path) -> None:
    write_data(tmp_path)
    said: dict[str, str] = {}
    stretches = 0
    for command in commands():
        if command.startswith("fedbio data fetch"):
            continue  # the table is there
        small = made_small(command)
        said[command] = run(small, tmp_path)
        while command.startswith("fedbio pretrain") and "the same command goes on" in said[command]:
            stretches += 1
            assert stretches < 50
            said[command] = run(small, tmp_path)
    assert stretches > 1

    for folder in ("run-44m", "trained-44m"):
        account = json.loads((tmp_path / folder / "training.json").read_text())
        assert (account["encoder"], account["finished"]) == ("esm1nv-44m", True)
        assert len(account["stretches"]) == stretches + 1
        assert account["corpus"]["excluded"] == 2
    test = table_sequences(tmp_path / "mixed_soft.csv")["test"]
    check_account(account["corpus"], read_again(account["corpus"], tmp_path, banned=Banned(test)))

    assert not (tmp_path / "trained-44m" / "corpus").exists()
    assert (tmp_path / "trained-44m" / "README.md").is_file()
    widths = {}
    for pooling in ("mean", "ends"):
        with Embeddings.open(tmp_path / f"{pooling}.h5") as store:
            assert (store.info.name, store.info.trained, store.info.pooling) == ("esm1nv-44m", True, pooling)
            assert store.info.weights_sha256 == account["weights_sha256"]
            widths[pooling] = store.info.width
    assert widths["ends"] > widths["mean"] == 32
    choice, measured = [json.loads(each.splitlines()[-1]) for call, each in said.items() if "scl_probe" in call]
    assert {each["features"] for each in choice["results"]} == {"mean", "ends", "cut"}
    assert {each.get("model") for each in measured["results"]} >= {"federated MLP", "boosted trees"}
    assert measured["embeddings"]["ends"]["weights_sha256"] == account["weights_sha256"]
