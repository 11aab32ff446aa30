"""Measure a round of swarm learning and a step of split learning, beside the least that moving their bytes costs.

**Swarm.** Three sites, each a process, over gRPC and mutual TLS, with a script that trains nothing: what is left is the
round itself. The limit is what its longest way costs in a bare loop in the same run: bytes over mutual TLS and gRPC
without anything of ours (`_bare`), seven times a model (two updates to the server, both on to the site that aggregates,
the mean to the server, and on to two sites), and AES-256-GCM over five (one sealed, two opened, the mean sealed and
opened).

**Split.** Two sites and a server that passes on what they send. The limit is the bare round trip of the same arrays as
object streams of our transport through a server, forth and back, in three processes of the same run, without tasks,
sessions, or a network.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _bare
import numpy as np
import yaml
from _processes import Party
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedbio.federation.split_items import ItemsSink
from fedbio.proteins import Protein, write_fasta
from fedbio.provision import provision
from fedbio.settings import FederationFile
from fedbio.transport import Credentials, ObjectPayload, Received, ServerEndpoint, SiteEndpoint

SITES = ("site-1", "site-2", "site-3")
PIECE_BYTES = 1 << 20

SWARM_GOAL, SPLIT_GOAL = 3.0, 3.0
"""The most that a round and a step may cost, in limits. A round also takes the model to each script and back over its
socket, and writes updates and models to disk, whole or not at all, which the limit does not know."""

SWARM_SCRIPT = """
import numpy as np
import fedbio.client as flare


def first():
    return {"w": np.ones(NUMBERS, np.float32)}


def main():
    flare.init()
    while flare.is_running():
        model = flare.receive()
        flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.0}))


if __name__ == "__main__":
    main()
"""

SPLIT_SCRIPT = """
import torch
from torch import nn


def bottom():
    return nn.Linear(8, WIDTH)


def top():
    return nn.Linear(WIDTH, 2)


def features(here):
    return [str(number) for number in range(ROWS)], torch.zeros(ROWS, 8)


def labels(here):
    return [str(number) for number in range(ROWS)], torch.zeros(ROWS, dtype=torch.int64)


def optimizer(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)
"""


def between(run: Path, event: str) -> list[float]:
    """Return the seconds between two events of a kind and the next, the first two left out: they begin cold."""
    events = [json.loads(line) for line in (run / "server/events.jsonl").read_text().splitlines()]
    times = [datetime.datetime.fromisoformat(each["time"]).timestamp() for each in events if each["event"] == event]
    return [after - before for before, after in itertools.pairwise(times[2:])]


def play(folder: Path, job: dict[str, Any], script: str) -> Path:
    """Run a job of a script with a process for each site; return the run's folder."""
    (folder / "data").mkdir(parents=True)
    (folder / "train.py").write_text(textwrap.dedent(script))
    (folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
    for site in SITES:
        write_fasta([Protein("a", "MKVA", "Nucleus", "train", False)], folder / f"data/{site}.fasta")
    arguments = ["simulate", folder / "jobs.yaml", "-o", folder / "run", "--data", folder / "data", "--pool", 0]
    subprocess.run([sys.executable, "-m", "fedbio", *map(str, arguments)], check=True)
    return folder / "run"


def kits(folder: Path) -> None:
    """Write what the bare loops show each other."""
    settings = {"federation": "benchmark", "server": {"address": "127.0.0.1:1"}, "sites": list(SITES)}
    provision(FederationFile.model_validate(settings), folder / "kits")


# --- swarm ---


def aes_seconds(size: int, times: int = 5) -> float:
    """Return the seconds to seal so many bytes in pieces of 1 MiB."""
    cipher, piece, took = AESGCM(AESGCM.generate_key(256)), os.urandom(PIECE_BYTES), []
    for _ in range(times):
        started = time.perf_counter()
        for number in range(-(-size // PIECE_BYTES)):
            cipher.encrypt(number.to_bytes(12, "big"), piece, None)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def grpc_seconds(folder: Path, size: int, times: int = 5) -> float:
    """Return the seconds to move so many bytes over bare gRPC with mutual TLS, with the sums and digests of ours."""
    with ExitStack() as stack:
        server, site = (stack.enter_context(Party(name)) for name in ("server", "site-1"))
        port = server.call(_bare.grpc_listen, f"{folder}/kits/server")
        site.call(_bare.grpc_dial, f"{folder}/kits/site-1", port)
        took = [
            site.call(_bare.grpc_loop, size, upwards=upwards, checks=True)
            for _ in range(times)
            for upwards in (True, False)
        ]
    return statistics.median(took[2:])


def measure_swarm(folder: Path, megabytes: float, rounds: int) -> list[dict[str, Any]]:
    """Return a round's seconds and its limit."""
    size = int(megabytes * 1e6)
    client = {"script": "train.py", "initial": "train.py:first"}
    job = {"workflow": "swarm", "rounds": rounds, "client": client}
    run = play(folder / "swarm", job, SWARM_SCRIPT.replace("NUMBERS", str(size // 4)))
    moved, sealed = grpc_seconds(folder, size), aes_seconds(size)
    limit = 7 * moved + 5 * sealed
    return [
        result(f"swarm: a round, 3 sites, {megabytes:g} MB", between(run, "round"), limit, SWARM_GOAL),
        {**_entry(f"swarm: {megabytes:g} MB over bare gRPC", moved), "goal": None},
        {**_entry(f"swarm: {megabytes:g} MB through AES-256-GCM", sealed), "goal": None},
    ]


# --- split ---


def serve(state: dict[str, Any], kit: str, folder: str) -> str:
    """Pass on what one of two sites sends to the other."""

    def pass_on(received: Received) -> None:
        other = "site-2" if received.peer == "site-1" else "site-1"
        state["endpoint"].send(other, "items", b"", ObjectPayload(received.payload))

    state["endpoint"] = ServerEndpoint(
        "127.0.0.1:0",
        Credentials.from_kit(kit),
        spool=f"{folder}/spool-server",
        on_message=pass_on,
        sinks={"items": lambda opening: ItemsSink(1 << 30)},
    ).start()
    return str(state["endpoint"].address)


def join(state: dict[str, Any], kit: str, folder: str, address: str) -> None:
    """Connect a site."""
    arrived = state["arrived"] = queue.SimpleQueue()
    state["endpoint"] = SiteEndpoint(
        address,
        Credentials.from_kit(kit),
        spool=f"{folder}/spool-{Path(kit).name}",
        on_message=lambda received: arrived.put(received.payload),
        sinks={"items": lambda opening: ItemsSink(1 << 30)},
    ).start()


def echo(state: dict[str, Any], count: int) -> None:
    """Send back what comes."""
    for _ in range(count):
        state["endpoint"].send("items", b"", ObjectPayload(state["arrived"].get(timeout=60)))


def round_trips(state: dict[str, Any], shape: tuple[int, int], count: int) -> list[float]:
    """Send an array and wait until it is back; return the seconds of each time."""
    took, items = [], {"output": np.ones(shape, np.float32)}
    for _ in range(count):
        started = time.perf_counter()
        state["endpoint"].send("items", b"", ObjectPayload(items))
        state["arrived"].get(timeout=60)
        took.append(time.perf_counter() - started)
    return took


def bare_round_trip(folder: Path, shape: tuple[int, int], count: int = 300) -> float:
    """Return the seconds of a round trip between two sites through a server."""
    with ExitStack() as stack:
        server, first, second = (stack.enter_context(Party(name)) for name in ("server", "site-1", "site-2"))
        address = server.call(serve, f"{folder}/kits/server", str(folder))
        for party in (first, second):
            party.call(join, f"{folder}/kits/{party.name}", str(folder), address)
        second.start(echo, count)
        took = first.call(round_trips, shape, count)
        second.result()
    return statistics.median(took[20:])


def measure_split(folder: Path, batch: int, width: int, epochs: int, steps: int = 100) -> list[dict[str, Any]]:
    """Return a step's seconds and its limit."""
    client = {"script": "train.py"}
    job = {"workflow": "split", "bottom": "site-1", "top": "site-2", "epochs": epochs, "batch_size": batch}
    script = SPLIT_SCRIPT.replace("ROWS", str(batch * steps)).replace("WIDTH", str(width))
    run = play(folder / "split", {**job, "client": client}, script)
    took = [seconds / steps for seconds in between(run, "epoch")]
    name = f"split: a step, activations {batch} x {width}"
    return [result(name, took, bare_round_trip(folder, (batch, width)), SPLIT_GOAL)]


# --- results ---


def _entry(name: str, seconds: float) -> dict[str, Any]:
    return {"name": name, "value": round(1000 * seconds, 3), "unit": "ms", "limit": None, "ratio": None, "met": None}


def result(name: str, took: list[float], limit: float, goal: float) -> dict[str, Any]:
    """Return an entry of the results; print it for a person."""
    value = statistics.median(took)
    print(f"{name:50s} {1000 * value:9.2f} ms, limit {1000 * limit:9.2f} ms", file=sys.stderr)
    ratio = value / limit
    entry = {"limit": round(1000 * limit, 3), "ratio": round(ratio, 3), "goal": goal, "met": ratio <= goal}
    return {**_entry(name, value), **entry}


def main() -> int:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=13.6, metavar="MB", help="size of the swarm's model")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="rounds of the swarm")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="epochs of the split network")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="proteins in a step")
    parser.add_argument("--width", type=int, default=256, metavar="N", help="units at the cut")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kits(folder)
        results = [
            *measure_swarm(folder, args.megabytes, args.rounds),
            *measure_split(folder, args.batch, args.width, args.epochs),
        ]
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "workflows", "machine": machine, "results": results}))
    return 0 if all(each["met"] is not False for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
