"""Measure what a round of federated averaging costs outside training: real processes, gRPC, mutual TLS.

Three sites, twenty rounds of the 512-256-128-64 classifier on 768 features. A site's seconds of a task are in its event
log; what a round took at the server beyond the slowest site's task is spent outside training. The same run gives the
server's start, from the process's to its line ``server listening on ...``, and its peak memory.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedbio.embeddings import sequence_digest, write_embeddings
from fedbio.proteins import COMPARTMENTS, Protein, write_fasta
from fedbio.provision import provision
from fedbio.results import EncoderInfo
from fedbio.settings import FederationFile

ENCODER = EncoderInfo("benchmark", "0" * 64, False, 768, "mean", 1, "float32", 510, "cut")
GOALS = {"outside training per round": 0.1, "server start to listening": 1.0, "server peak memory": 200.0}


def make_site(folder: Path, name: str, count: int, seed: int) -> None:
    """Write labelled random proteins and random embeddings for them."""
    random = np.random.default_rng(seed)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    proteins = [
        Protein(
            f"{name}-{number}",
            "M" + "".join(random.choice(letters, 40)),
            COMPARTMENTS[int(random.integers(10))],
            "test" if number % 5 == 0 else "train",
            number % 10 == 1,
        )
        for number in range(count)
    ]
    write_fasta(proteins, folder / f"{name}.fasta")
    (folder / name).mkdir()
    write_embeddings(
        folder / name / "embeddings.h5",
        info=ENCODER,
        ids=[each.id for each in proteins],
        lengths=[len(each.sequence) for each in proteins],
        digests=[sequence_digest(each.sequence) for each in proteins],
        blocks=iter([random.normal(size=(count, 768)).astype(np.float32)]),
    )


def start_server(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[str], str, float]:
    """Start a server and return it, its address and the seconds until it listened."""
    started = time.perf_counter()
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if "server listening on " in line:
            return server, line.rpartition(" ")[2].strip(), time.perf_counter() - started
    raise SystemExit(f"the server ended with exit code {server.wait()}")


def measure(sites: int, rounds: int, proteins: int, folder: Path) -> dict[str, Any]:
    """Run the study once and return what was measured."""
    names = [f"site-{number}" for number in range(1, sites + 1)]
    for seed, name in enumerate(names):
        make_site(folder, name, proteins, seed)
    settings = {"federation": "benchmark", "server": {"address": "127.0.0.1:1"}, "sites": names}
    provision(FederationFile.model_validate(settings), folder / "kits")
    training = {"mlps": ["512-256-128-64"], "seeds": [0], "rounds": rounds, "patience": rounds}
    jobs = folder / "jobs.yaml"
    jobs.write_text(yaml.safe_dump({"jobs": [{"workflow": "classify", "training": training}]}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    fedbio = [sys.executable, "-m", "fedbio"]
    serve = [*fedbio, "server", "--kit", f"{folder}/kits/server", "--jobs", str(jobs)]
    server, address, listening_s = start_server(
        [*serve, "-o", f"{folder}/server", "--listen", "127.0.0.1:0"], environment
    )
    site = [*fedbio, "site", "--server", address, "--threads", "1"]
    parties = [
        subprocess.Popen(
            [*site, "--kit", f"{folder}/kits/{name}", "--data", f"{folder}/{name}.fasta", "-o", f"{folder}/{name}"],
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for name in names
    ]
    log = server.communicate()[1]
    if server.returncode or any(party.wait() for party in parties):
        raise SystemExit(f"the run failed:\n{log}")
    record = json.loads((folder / "server" / "party.json").read_text())
    return {
        "outside": outside_training(folder, names),
        "listening": listening_s,
        "memory": record["peak_memory_bytes"] / 1e6,
    }


def outside_training(folder: Path, names: list[str]) -> list[float]:
    """Return, for each round, the seconds at the server beyond the slowest site's."""
    slowest: dict[str, float] = {}
    for name in names:
        for event in read_events(folder / name):
            if event["event"] == "task done" and event["task"] == "train":
                slowest[event["id"]] = max(slowest.get(event["id"], 0.0), event["seconds"])
    sent = [each for each in read_events(folder / "server") if each["event"] == "task sent"]
    # from one round's task to the next: sending, answering, checking, averaging, saving
    return [
        seconds_between(this["time"], after["time"]) - slowest[this["id"]]
        for this, after in itertools.pairwise(sent)
        if this["task"] == "train"
    ]


def seconds_between(first: str, second: str) -> float:
    """Return the seconds between two of the event log's times."""
    from datetime import datetime

    return (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return a party's events."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=3, help="number of sites (default: 3)")
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: 20)")
    parser.add_argument("--proteins", type=int, default=300, help="proteins per site (default: 300)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedbio-rounds-") as folder:
        found = measure(args.sites, args.rounds, args.proteins, Path(folder))
    # the median: a machine's other work shows in the worst rounds
    values = {
        "outside training per round": (float(np.median(found["outside"])), "s"),
        "server start to listening": (found["listening"], "s"),
        "server peak memory": (found["memory"], "MB"),
    }
    results = [
        {
            "name": name,
            "value": round(value, 4),
            "unit": unit,
            "limit": None,
            "ratio": None,
            "goal": GOALS[name],
            "met": value < GOALS[name],
        }
        for name, (value, unit) in values.items()
    ]
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "rounds", "machine": machine, "results": results}))
    return 0 if all(each["met"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
