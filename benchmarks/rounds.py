"""Measure what a round of federated averaging costs outside training: real processes, gRPC, mutual TLS.

Three sites, twenty rounds of the 512-256-128-64 classifier on 768 features. A site's seconds of a task are in its event
log; what a round took at the server beyond the slowest site's task is spent outside training. The limit is a bare gRPC
loop in the same run that moves the same bytes between as many processes, with the same encryption, sums and digests.
The same run gives the server's start, from the process's to its line ``server listening on ...``, its memory at rest
and at its peak, and the processor time of a round over all parties. ``fedbio simulate`` is timed from its start until
the first round has all answers, beside as many bare imports of the scripts' library at once. Last, rounds in which
nobody trains are timed with 3, 10, 30 and 100 sites.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _bare
import _crowd
import numpy as np
import yaml
from _processes import Party
from safetensors.numpy import save_file

from fedbio.embeddings import sequence_digest, write_embeddings
from fedbio.proteins import COMPARTMENTS, Protein, write_fasta
from fedbio.provision import provision
from fedbio.results import EncoderInfo
from fedbio.settings import FederationFile

ENCODER = EncoderInfo("benchmark", "0" * 64, False, 768, "mean", 1, "float32", 510, "cut")
GOALS = {
    "outside training per round": 2.0,  # times the bare loop
    "server start to listening": 0.5,
    "server memory at rest": 100.0,
    "simulate to the first round": 3.0,
    "growth per site": 1.5,  # times that of the fewest sites
}
MODEL = "512-256-128-64"
GROWTH_ROUNDS = 5


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
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if "server listening on " in line:
            return server, line.rpartition(" ")[2].strip(), time.perf_counter() - started
    raise SystemExit(f"the server ended with exit code {server.wait()}")


def measure(sites: int, rounds: int, proteins: int, folder: Path) -> dict[str, Any]:
    """Run the study once and return what was measured."""
    names = [f"site-{number}" for number in range(1, sites + 1)]
    folder.mkdir()
    for seed, name in enumerate(names):
        make_site(folder, name, proteins, seed)
    settings = {"federation": "benchmark", "server": {"address": "127.0.0.1:1"}, "sites": names}
    provision(FederationFile.model_validate(settings), folder / "kits")
    training = {"mlps": [MODEL], "seeds": [0], "rounds": rounds, "patience": rounds}
    jobs = folder / "jobs.yaml"
    jobs.write_text(yaml.safe_dump({"jobs": [{"workflow": "classify", "training": training}]}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    fedbio = [sys.executable, "-m", "fedbio"]
    serve = [*fedbio, "server", "--kit", f"{folder}/kits/server", "--jobs", str(jobs)]
    server, address, listening_s = start_server(
        [*serve, "-o", f"{folder}/server", "--listen", "127.0.0.1:0"], environment
    )
    resting = memory_of(server.pid)
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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = server.communicate()[1]
    if server.returncode or any(party.wait() for party in parties):
        raise SystemExit(f"the run failed:\n{log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads((folder / "server" / "party.json").read_text())
    return {
        "outside": outside_training(folder, names),
        "listening": listening_s,
        "resting": resting,
        "memory": record["peak_memory_bytes"] / 1e6,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def memory_of(process: int) -> float:
    """Return a process's resident memory in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def model_bytes() -> int:
    """Return the size of the model's parameters."""
    widths = [768, *map(int, MODEL.split("-")), len(COMPARTMENTS)]
    return 4 * sum((before + 1) * after for before, after in itertools.pairwise(widths))


def bare_loop(sites: int, rounds: int, folder: Path) -> list[float]:
    """Return the seconds of rounds in which each site only takes the model and sends it back, all at once."""
    size = model_bytes()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Party("server"))
        port = server.call(_bare.grpc_listen, f"{folder}/kits/server", workers=sites + 1)
        parties = [stack.enter_context(Party(f"site-{number}")) for number in range(1, sites + 1)]
        for party in parties:
            party.call(_bare.grpc_dial, f"{folder}/kits/{party.name}", port)
        took = []
        for turn in range(-2, rounds):
            started = time.perf_counter()
            for upwards in (False, True):
                for party in parties:
                    party.start(_bare.grpc_loop, size, upwards=upwards, checks=True)
                for party in parties:
                    party.result()
            if turn >= 0:
                took.append(time.perf_counter() - started)
    return took


SCRIPT = """
import {library}

import fedbio.client as flare


def net():
    return {net}


if __name__ == "__main__":
    flare.init()
    while flare.is_running():
        model = flare.receive()
        flare.send(flare.FLModel(params=model.params, metrics={{"accuracy": 0.5}}))
"""

NETS = {"torch": "torch.nn.Linear(768, 10)", "numpy": "{'weight': numpy.zeros((10, 768), numpy.float32)}"}
"""What a script returns as its first model, by the library that it imports."""


def first_round(sites: int, library: str, folder: Path) -> tuple[float, float]:
    """Return the seconds to the first round, and those of the bare imports.

    They go from the start of ``fedbio simulate`` until every site's script has answered its first task to train: data,
    kits, the start of a server and of all sites, the scripts, and the model that one of them makes. The bare imports
    are as many interpreters at once that import the library and end.
    """
    folder.mkdir()
    bare_started = time.perf_counter()
    bare = [subprocess.Popen([sys.executable, "-c", f"import {library}"]) for _ in range(sites)]
    for each in bare:
        each.wait()
    bare_s = time.perf_counter() - bare_started
    (folder / "train.py").write_text(SCRIPT.format(library=library, net=NETS[library]))
    job = {"workflow": "fedavg", "rounds": 2, "client": {"script": "train.py", "initial": "train.py:net"}}
    (folder / "job.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
    started = datetime.now(UTC)
    command = [sys.executable, "-m", "fedbio", "simulate", f"{folder}/job.yaml", "--sites", str(sites)]
    subprocess.run([*command, "-o", f"{folder}/run"], check=True, capture_output=True)
    closed = [each for each in read_events(folder / "run" / "server") if each["event"] == "task closed"]
    first = next(each for each in closed if each["task"] == "client/train")
    return (datetime.fromisoformat(first["time"]) - started).total_seconds(), bare_s


def first_rounds(sites: int, library: str, folder: Path) -> tuple[float, float]:
    """Return the medians of three starts, each beside its bare imports."""
    found = [first_round(sites, library, folder / f"{library}-{turn}") for turn in range(3)]
    times, bare = zip(*found, strict=True)
    return float(np.median(times)), float(np.median(bare))


def growth(sites: int, rounds: int, folder: Path) -> dict[str, float]:
    """Return what a round with many sites costs, in which nobody trains.

    The server is a process as always; the sites are real ones with connections of their own over gRPC and mutual TLS,
    on threads of as many processes as there are processors.

    Returns
    -------
    dict
        ``round`` in seconds (the median), ``cpu`` seconds of the server in a round, and its peak memory in MB.
    """
    names = [f"site-{number}" for number in range(1, sites + 1)]
    folder.mkdir()
    settings = {"federation": "benchmark", "server": {"address": "127.0.0.1:1"}, "sites": names}
    provision(FederationFile.model_validate(settings), folder / "kits")
    (folder / "train.py").write_text("# its tasks are played\n")
    widths = [768, *map(int, MODEL.split("-")), len(COMPARTMENTS)]
    model = {
        f"layers.{number}.weight": np.ones((after, before + 1), np.float32)
        for number, (before, after) in enumerate(itertools.pairwise(widths))
    }
    save_file(model, folder / "model.safetensors")
    job = {"workflow": "fedavg", "rounds": rounds, "model": "model.safetensors", "client": {"script": "train.py"}}
    (folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job], "tracking": []}))
    serve = [
        sys.executable,
        "-m",
        "fedbio",
        "server",
        "--kit",
        f"{folder}/kits/server",
        "--jobs",
        f"{folder}/jobs.yaml",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    server, address, _ = start_server([*serve, "-o", f"{folder}/server", "--listen", "127.0.0.1:0"], dict(os.environ))
    crowd = min(sites, len(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        parties = [stack.enter_context(Party(f"crowd-{number}", {"OMP_NUM_THREADS": "1"})) for number in range(crowd)]
        for number, party in enumerate(parties):
            party.start(_crowd.play, str(folder), names[number::crowd], address)
        log = server.communicate()[1]
        # before the others end, which count as well
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if server.returncode:
            raise SystemExit(f"the run failed:\n{log}")
        for party in parties:
            party.result()
    sent = [
        each
        for each in read_events(folder / "server")
        if each["event"] == "task sent" and each["task"] != "client/deploy"
    ]
    took = [seconds_between(this["time"], after["time"]) for this, after in itertools.pairwise(sent)][:rounds]
    record = json.loads((folder / "server" / "party.json").read_text())
    return {
        "round": float(np.median(took[1:])),
        "cpu": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / rounds,
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
    return (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return a party's events."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def result(
    name: str,
    value: float,
    unit: str,
    *,
    limit: float | None = None,
    most: float | None = None,
    most_times: float | None = None,
) -> dict[str, Any]:
    """Return an entry of the results: its goal is the most that the value may be, or the most times the limit."""
    goal = most if most_times is None else most_times
    ratio = None if limit is None else value / limit
    measured = value if most_times is None else ratio
    print(f"{name:42s} {value:9.3f} {unit}" + ("" if limit is None else f", {ratio:.2f} times {limit:.3f}"))
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "limit": None if limit is None else round(limit, 4),
        "ratio": None if ratio is None else round(ratio, 3),
        "goal": goal,
        "met": None if goal is None or measured is None else measured <= goal,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=3, help="number of sites (default: 3)")
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: 20)")
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        default=[3, 10, 30, 100],
        metavar="N",
        help="numbers of sites (default: 3 10 30 100)",
    )
    parser.add_argument("--proteins", type=int, default=300, help="proteins per site (default: 300)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedbio-rounds-") as folder:
        found = measure(args.sites, args.rounds, args.proteins, Path(folder) / "rounds")
        short = measure(args.sites, 1, args.proteins, Path(folder) / "short")
        bare = float(np.median(bare_loop(args.sites, args.rounds, Path(folder) / "rounds")))
        first = {library: first_rounds(args.sites, library, Path(folder)) for library in NETS}
        grown = {
            sites: growth(sites, GROWTH_ROUNDS, Path(folder) / f"growth-{sites}") for sites in sorted(set(args.growth))
        }
    # the median: a machine's other work shows in the worst rounds
    outside = float(np.median(found["outside"]))
    results = [
        result("outside training per round", outside, "s", limit=bare, most_times=GOALS["outside training per round"]),
        result("server start to listening", found["listening"], "s", most=GOALS["server start to listening"]),
        result("server memory at rest", found["resting"], "MB", most=GOALS["server memory at rest"]),
        result("server peak memory", found["memory"], "MB"),
        *(
            result(
                f"simulate to the first round, {library}", took, "s", limit=bare_s,
                most=GOALS["simulate to the first round"],
            )
            for library, (took, bare_s) in first.items()
        ),
        result("processor time of a round, all parties", (found["cpu"] - short["cpu"]) / (args.rounds - 1), "s"),
    ]  # fmt: skip
    fewest = min(grown, default=0)
    for sites, costs in grown.items():
        results += [
            result(
                f"round without training per site, {sites} sites", costs["round"] / sites, "s",
                limit=grown[fewest]["round"] / fewest, most_times=GOALS["growth per site"],
            ),
            result(f"processor time of the server in a round, {sites} sites", costs["cpu"], "s"),
            result(f"server peak memory, {sites} sites", costs["memory"], "MB"),
        ]  # fmt: skip
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "rounds", "machine": machine, "results": results}))
    return 0 if all(each["met"] is not False for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
