"""A federation of real processes with small embeddings that were computed before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedbio.embeddings import sequence_digest, write_embeddings
from fedbio.proteins import COMPARTMENTS, Protein, write_fasta
from fedbio.provision import provision
from fedbio.results import EncoderInfo
from fedbio.settings import FederationFile

ENCODER = EncoderInfo("small", "1" * 64, True, 16, "mean", 1, "float32", 128, "cut")
FEDBIO = [sys.executable, "-m", "fedbio"]
SITES = ("site-1", "site-2", "site-3")


def make_proteins(site: str, count: int) -> list[Protein]:
    """Random proteins of three locations."""
    random = np.random.default_rng(int(site[-1]))
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    return [
        Protein(
            f"{site}-{number}",
            "M" + "".join(random.choice(letters, 40)),
            COMPARTMENTS[number % 3],
            "test" if number % 5 == 0 else "train",
            number % 5 == 1,
        )
        for number in range(count)
    ]


def write_site(folder: Path, site: str, count: int) -> None:
    """A FASTA file, and its embeddings where the site looks for them."""
    proteins = make_proteins(site, count)
    write_fasta(proteins, folder / f"{site}.fasta")
    random = np.random.default_rng(10 + int(site[-1]))
    rows = random.normal(size=(len(proteins), 16))
    for row, protein in zip(rows, proteins, strict=True):
        row[COMPARTMENTS.index(protein.target or "")] += 1.5
    (folder / site).mkdir()
    write_embeddings(
        folder / site / "embeddings.h5",
        info=ENCODER,
        ids=[each.id for each in proteins],
        lengths=[len(each.sequence) for each in proteins],
        digests=[sequence_digest(each.sequence) for each in proteins],
        blocks=iter([rows.astype(np.float32)]),
    )


@dataclass
class Parties:
    """Starts parties as processes of their own, each with a log file, and ends them."""

    folder: Path
    port: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def write_jobs(self, *, rounds: int, **limits: Any) -> None:
        training = {"mlps": ["8"], "seeds": [0, 1], "rounds": rounds, "patience": rounds}
        federation = {"heartbeat_s": 2, "join_deadline_s": 60, **limits}
        jobs = {"jobs": [{"workflow": "classify", "training": training}], "federation": federation}
        (self.folder / "jobs.yaml").write_text(yaml.safe_dump(jobs))

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen([*FEDBIO, *arguments], stdout=log, stderr=log, env=environment)
        self.running.append(process)
        return process

    def server(self) -> subprocess.Popen[bytes]:
        kit, jobs, output = self.folder / "kits/server", self.folder / "jobs.yaml", self.folder / "server"
        return self.start("server", "server", "--kit", str(kit), "--jobs", str(jobs), "-o", str(output))

    def site(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        kit, data, output = self.folder / "kits" / name, self.folder / f"{name}.fasta", self.folder / name
        arguments = ["--kit", str(kit), "--data", str(data), "-o", str(output), "--threads", "1", *more]
        return self.start(name, "site", "--connect-deadline", "60", *arguments)

    def write_script_job(self, script: str, **job: Any) -> None:
        """A job whose script is `train.py`, with limits for parties that are killed."""
        (self.folder / "train.py").write_text(textwrap.dedent(script))
        whole = {**job, "client": {"script": "train.py", "initial": "train.py:first"}}
        limits = {"heartbeat_s": 2, "join_deadline_s": 60, "round_deadline_s": 60}
        (self.folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [whole], "federation": limits}))

    def script_site(self, name: str) -> subprocess.Popen[bytes]:
        """A site that lets `train.py` run."""
        return self.site(name, "--code", str(self.folder / "train.py"))

    def events(self) -> list[dict[str, Any]]:
        """The server's events so far."""
        path = self.folder / "server" / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_event(self, event: str, key: str, least: int, *, within_s: float = 90) -> None:
        """Wait until the server has written an event whose number `key` is large enough."""
        deadline = time.monotonic() + within_s
        while not any(each["event"] == event and each[key] >= least for each in self.events()):
            assert time.monotonic() < deadline, self.log("server") + self.log("site-1")
            time.sleep(0.02)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, name: str, text: str, *, within_s: float = 60) -> None:
        deadline = time.monotonic() + within_s
        while text not in self.log(name):
            assert time.monotonic() < deadline, f"{text!r} is not in the log of {name}:\n{self.log(name)}"
            time.sleep(0.02)

    def wait_for_round(self, seed: int, number: int, *, within_s: float = 90) -> None:
        """Wait until the server has measured a round of the run with a seed."""
        deadline = time.monotonic() + within_s
        while (seed, number) not in self.rounds():
            assert time.monotonic() < deadline, self.log("server")
            time.sleep(0.02)

    def rounds(self) -> list[tuple[int, int]]:
        """Seed and number of every round that the server has measured."""
        return [(each["seed"], each["round"]) for each in self.events() if each["event"] == "round"]

    def end(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()


def make_parties(folder: Path, port: int, *, count: int = 60, driver: str = "grpc") -> Parties:
    """Kits for this port, and the data of three sites."""
    settings = {
        "federation": "test",
        "server": {"address": f"127.0.0.1:{port}"},
        "sites": list(SITES),
        "driver": driver,
    }
    provision(FederationFile.model_validate(settings), folder / "kits")
    for site in SITES:
        write_site(folder, site, count)
    return Parties(folder, port)


@pytest.fixture
def many_proteins(tmp_path: Path, free_port: int) -> Iterator[Parties]:
    """Sites of 250 proteins, 50 of them for the test."""
    made = make_parties(tmp_path, free_port, count=250, driver="tcp")
    yield made
    made.end()


@pytest.fixture
def parties(tmp_path: Path, free_port: int) -> Iterator[Parties]:
    made = make_parties(tmp_path, free_port)
    yield made
    made.end()
