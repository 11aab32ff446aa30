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
    "tokens": "3e3",
    "device": "cpu",
    "threads": 1,
    # every stretch is over after one update
    "pretrain": [*ARCHITECTURE, "--pack-tokens", "512", "--no-tensorboard", "--minutes", "1e-9"],
    "probe": ["--mlp", "8", "--rounds", "2", "--seeds", "0"],
}
"""What makes the command small."""


def commands() -> list[str]:
    """The commands of the manual's section, in order."""
    manual = (ROOT / "docs" / "pretraining.md").read_text()
    section = manual.split("## From proteins to an encoder to give away\n")[1].split("\n## ")[0]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [line.removeprefix("$ ") for line in block[1].splitlines()]


def made_small(command: str, folder: Path) -> list[str]:
    """The same command for a tiny network, run in another folder."""
    words = [str(ROOT / word) if word == "config/encoder.yaml" else word for word in shlex.split(command)]
    words[0] = str(Path(sys.executable).parent / words[0])
    more = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    return [*words, *more, "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command; return its exit code, and what it has said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    return done.returncode, done.stdout + done.stderr


def write_data(folder: Path) -> None:
    """A corpus with two proteins of the test in it, held-out proteins, and a table in FLIP's form."""
    run([sys.executable, "-m", "fedbio", "data", "demo", "-o", "demo.fasta", "--count", "150"], folder)
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
def test_the_manuals_command_leads_from_proteins_to_a_measured_encoder(tmp_path: Path) -> None:
    write_data(tmp_path)
    fetch, command = commands()
    assert fetch.startswith("fedbio data fetch mixed_soft -o mixed_soft.csv")  # the table is there
    stretches = 1
    code, said = run(made_small(command, tmp_path), tmp_path)
    while code and "say the same command again" in said:
        stretches += 1
        assert stretches < 50
        code, said = run(made_small(command, tmp_path), tmp_path)
    assert code == 0, said
    assert stretches > 1

    results = tmp_path / "results" / "encoder"
    for folder in ("training", "esm1nv-44m"):
        account = json.loads((results / folder / "training.json").read_text())
        assert (account["encoder"], account["finished"]) == ("esm1nv-44m", True)
        assert len(account["stretches"]) == stretches
        assert account["corpus"]["excluded"] == 2
    proteins = [sequence for part in table_sequences(tmp_path / "mixed_soft.csv").values() for sequence in part]
    check_account(account["corpus"], read_again(account["corpus"], tmp_path, banned=Banned(proteins)))

    assert not (results / "esm1nv-44m" / "corpus").exists()
    assert (results / "esm1nv-44m" / "README.md").is_file()
    widths = {}
    for name, pooling in (("mean", "mean"), ("ends", "ends"), ("untrained", "ends")):
        with Embeddings.open(results / f"{name}.h5") as store:
            assert (store.info.trained, store.info.pooling) == (name != "untrained", pooling)
            assert (store.info.weights_sha256 == account["weights_sha256"]) == store.info.trained
            widths[name] = store.info.width
    assert widths["ends"] == widths["untrained"] > widths["mean"] == 32
    choice, measured = (json.loads((results / f"{name}.json").read_text()) for name in ("choice", "probe"))
    assert {each["features"] for each in choice["results"]} == {"mean", "ends", "cut", "exact"}
    assert {each["split"] for each in choice["results"]} == {"validation"}
    assert {each.get("model") for each in measured["results"]} >= {"federated MLP", "boosted trees", "vote of all"}
    assert measured["embeddings"]["ends"]["weights_sha256"] == account["weights_sha256"]
    # the two tables for people
    assert "| ends | federated MLP |" in (tmp_path / "logs" / "encoder" / "probe.log").read_text()
