"""Stream the paper's massive model: 64 tensors of 2 GB, from a server to two sites and back with aggregation.

Server and sites are processes of their own, over mutual TLS. Tensors are made on the fly, another one at each site, and
every chunk is compared with what it must be on its arrival; nobody holds a model. One round is

1. the server streams the global model to both sites,
2. both sites stream their own back, and the server averages,
3. both sites receive the mean and compare it with what it must be.

``--mode lockstep``  2 and 3 at once, chunk by chunk, and a commit at the end: neither memory nor disk at the server
``--mode file``      updates are checked and spooled to files at the server, averaged from them into the next model's
                     file, and published from that: needs three models' room in ``--folder``

The resident memory of all parties is read every second, from outside. The last line of output is one JSON object in
the form that README.md describes; it and a plot of memory over time are written to ``--output``. The exit code is 0 if
all goals are met.

Examples::

    python benchmarks/massive.py
    python benchmarks/massive.py --gigabytes 128 --driver tcp
    python benchmarks/massive.py --gigabytes 8 --mode file --slow-site 100
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _processes import Party, cpu_seconds

from fedbio.federation import messages
from fedbio.federation.allocation import use_one_arena
from fedbio.federation.lockstep import Lockstep
from fedbio.federation.lockstep_site import LockstepSite
from fedbio.federation.model import PARAMS
from fedbio.federation.model_file import ModelFile, ModelFilePayload, UpdateSink
from fedbio.provision import provision
from fedbio.settings import FederationFile
from fedbio.tensors import average_files, weighted_mean
from fedbio.tensors.layout import manifest_header
from fedbio.transport import (
    BytesPayload,
    ConsumerSink,
    Credentials,
    Limits,
    Opening,
    Received,
    ServerEndpoint,
    SiteEndpoint,
)

MIB = 1 << 20
TENSORS = 64
SITES = ("site-1", "site-2")
WEIGHTS = {"site-1": 1.0, "site-2": 3.0}
BLOCK = MIB // 4
"""Values in a chunk."""
LIMITS = Limits(idle_s=600.0)
MODEL, UPDATE, NEXT = "model", "update", "next"
GROWTH_GOAL_MIB = 128


# the model: each chunk is a window on two blocks of random numbers, at a place that depends on tensor and chunk


@functools.cache
def _pattern(who: str) -> np.ndarray:
    if who == "mean":
        parts = [(site, {"x": _pattern(site)}, weight) for site, weight in WEIGHTS.items()]
        return weighted_mean(parts)["x"]
    return np.random.default_rng(len(who) + ord(who[-1])).standard_normal(2 * BLOCK, np.float32)


def _chunk(who: str, tensor: int, chunk: int) -> np.ndarray:
    place = (tensor * 104_729 + chunk * 7_919) % BLOCK
    return _pattern(who)[place : place + BLOCK]


def _manifest(blocks: int, prefix: str = "") -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {f"{prefix}tensor.{number:02d}": ((blocks * BLOCK,), np.dtype(np.float32)) for number in range(TENSORS)}


def _size(blocks: int, prefix: str = "") -> int:
    return len(manifest_header(_manifest(blocks, prefix))) + TENSORS * blocks * MIB


def _chunks(
    who: str, blocks: int, throttle: Callable[[int], None] = lambda count: None, prefix: str = ""
) -> Iterator[memoryview]:
    yield memoryview(manifest_header(_manifest(blocks, prefix)))
    for tensor in range(TENSORS):
        for chunk in range(blocks):
            throttle(MIB)
            yield _chunk(who, tensor, chunk).view(np.uint8).data


class Verifier:
    """Compares what arrives with what it must be, wherever chunks begin."""

    def __init__(self, who: str, blocks: int, throttle: Callable[[int], None], prefix: str) -> None:
        self._who, self._blocks, self._throttle = who, blocks, throttle
        self._head = manifest_header(_manifest(blocks, prefix))
        self.bytes = 0

    def __call__(self, chunk: memoryview) -> None:
        self._throttle(len(chunk))
        while len(chunk):
            at = self.bytes - len(self._head)
            if at < 0:
                expected = memoryview(self._head)[self.bytes :]
            else:
                number, begin = divmod(at, MIB)
                expected = _chunk(self._who, *divmod(number, self._blocks)).view(np.uint8).data[begin:]
            count = min(len(chunk), len(expected))
            if not np.array_equal(np.frombuffer(chunk[:count], np.uint8), np.frombuffer(expected[:count], np.uint8)):
                raise ValueError(f"wrong bytes between {self.bytes} and {self.bytes + count}")
            self.bytes += count
            chunk = chunk[count:]


class Throttle:
    """Waits so that no more than a rate passes."""

    def __init__(self, megabytes_per_s: float) -> None:
        self._rate = megabytes_per_s * 1e6
        self._due = time.monotonic()

    def __call__(self, count: int) -> None:
        if self._rate:
            self._due = max(self._due, time.monotonic() - 0.1) + count / self._rate
            time.sleep(max(0.0, self._due - time.monotonic()))


# what runs at the parties


def start_server(state: dict[str, Any], folder: str, driver: str, blocks: int) -> str:
    """Start the server; return its address."""
    use_one_arena()  # as fedbio's own server does
    place = Path(folder)

    def update_sink(opening: Opening) -> UpdateSink:
        return UpdateSink(place / "updates", _manifest(blocks), lambda reason: print(opening.peer, reason))

    def take(received: Received) -> None:
        if received.topic == messages.PART:
            state["lockstep"].take(received)
        elif received.topic == UPDATE:
            state["updates"][received.peer] = received.payload
            state["arrived"].release()

    server = ServerEndpoint(
        "127.0.0.1:0",
        Credentials.from_kit(place / "kits" / "server"),
        spool=place / "spool",
        on_message=take,
        sinks={messages.PART: lambda opening: state["lockstep"].sink(opening), UPDATE: update_sink},
        limits=LIMITS,
        driver=driver,
    )
    state.update(
        server=server, folder=place, blocks=blocks, updates={}, arrived=threading.Semaphore(0),
        lockstep=Lockstep(lambda *message: server.send(*message)),
    )  # fmt: skip
    server.start()
    return server.address


def start_site(
    state: dict[str, Any], name: str, address: str, folder: str, driver: str, blocks: int, slow: float
) -> None:
    """Start a site."""
    throttle = Throttle(slow)
    state["done"] = threading.Event()

    def verifier(who: str, prefix: str = "") -> ConsumerSink:
        return ConsumerSink(Verifier(who, blocks, throttle, prefix))

    def send_update(received: Received) -> None:
        if received.topic == NEXT:
            state["done"].set()
        elif not lockstep.take(received) and received.topic == UPDATE:
            # a thread of its own: this one belongs to the message that asks for it
            payload = BytesPayload(_chunks(name, blocks, throttle, PARAMS), size=_size(blocks, PARAMS))
            threading.Thread(target=site.send, args=(UPDATE, b"", payload), daemon=True).start()

    site = SiteEndpoint(
        address,
        Credentials.from_kit(Path(folder) / "kits" / name),
        spool=Path(folder) / name,
        on_message=send_update,
        sinks={
            MODEL: lambda opening: verifier("global"),
            NEXT: lambda opening: verifier("mean", PARAMS),
            messages.MEAN: lambda opening: lockstep.sink(opening),
        },
        limits=LIMITS,
        driver=driver,
    )
    lockstep = LockstepSite(
        lambda topic, body, payload: site.send(topic, body, payload),
        part=lambda exchange: BytesPayload(_chunks(name, blocks, throttle), size=_size(blocks)),
        store=lambda exchange, size: verifier("mean"),
        adopt=lambda exchange, mean: state["done"].set(),
    )
    site.start()


def send_model(state: dict[str, Any]) -> None:
    """Stream the global model to all sites at once."""
    blocks = state["blocks"]
    payload = BytesPayload(_chunks("global", blocks), readers=len(SITES), size=_size(blocks))
    _to_all(state, MODEL, payload)


def exchange(state: dict[str, Any]) -> None:
    """Average in lockstep."""
    done = state["lockstep"].average(WEIGHTS, _manifest(state["blocks"]), SITES)
    assert done.parts == done.holders == SITES, done


def gather(state: dict[str, Any]) -> None:
    """Take both sites' updates into files."""
    _to_all(state, UPDATE, None)
    for _ in SITES:
        state["arrived"].acquire()


def average(state: dict[str, Any]) -> None:
    """Average the files into the next model's."""
    parts = [(site, model.path, WEIGHTS[site]) for site, model in state["updates"].items()]
    average_files(parts, state["folder"] / "next.safetensors")
    state["updates"].clear()


def publish(state: dict[str, Any]) -> None:
    """Stream the next model from its file."""
    _to_all(state, NEXT, ModelFilePayload({}, ModelFile.open(state["folder"] / "next.safetensors")))


def wait_done(state: dict[str, Any]) -> None:
    """Wait until this site has the next model."""
    assert state["done"].wait(600)


def _to_all(state: dict[str, Any], topic: str, payload: Any) -> None:
    failures: list[BaseException] = []

    def send(site: str) -> None:
        try:
            state["server"].send(site, topic, b"", payload)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(site,)) for site in SITES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _process(state: dict[str, Any]) -> tuple[int, float]:
    return os.getpid(), cpu_seconds()


# what is watched from outside


class Watch:
    """Reads the resident memory of processes once a second."""

    def __init__(self, processes: dict[str, int]) -> None:
        self._processes = processes
        self._began = time.monotonic()
        self.seconds: list[float] = []
        self.mib: dict[str, list[float]] = {name: [] for name in processes}
        self.stages: list[tuple[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._read()
        self._thread.start()

    def stage(self, name: str) -> None:
        """Note that a stage begins."""
        self.stages.append((name, time.monotonic() - self._began))
        print(f"{self.stages[-1][1]:8.1f} s  {name}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop."""
        self.stage("end")
        self._stop.set()
        self._thread.join()

    def growth_mib(self, name: str) -> float:
        """Return by how much a process has grown at most since the beginning."""
        return max(self.mib[name]) - self.mib[name][0]

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._read()

    def _read(self) -> None:
        self.seconds.append(round(time.monotonic() - self._began, 1))
        for name, process in self._processes.items():
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
            assert found is not None
            self.mib[name].append(round(int(found[1]) / 1024, 1))


def plot(watch: Watch, title: str, path: Path) -> None:
    """Draw the memory of all parties over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, color in zip(watch.mib, ("#1b6ca8", "#d1495b", "#edae49"), strict=True):
        axes.plot(watch.seconds, watch.mib[name], label=name, color=color, linewidth=1.5)
    for (name, begin), (_, end) in zip(watch.stages, watch.stages[1:], strict=False):
        axes.axvline(begin, color="0.8", linewidth=0.8, zorder=0)
        axes.text((begin + end) / 2, 1.0, name, ha="center", va="bottom", transform=axes.get_xaxis_transform())
    axes.set(xlabel="seconds", ylabel="resident memory (MiB)", ylim=(0, None), xlim=(0, watch.seconds[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="lower center")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run one round and report."""
    parser = argparse.ArgumentParser(description="Stream a massive model through a round of federated averaging.")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="GB of the model (default: 8; the paper's: 128)")
    parser.add_argument("--mode", choices=["lockstep", "file"], default="lockstep")
    parser.add_argument("--slow-site", type=float, default=0.0, metavar="MB/S", help="throttle one site to that rate")
    parser.add_argument("--driver", default="grpc")
    parser.add_argument("--folder", type=Path, help="where files are written (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="folder for the figures and the plot")
    options = parser.parse_args()
    blocks = max(1, round(options.gigabytes * 1e9 / TENSORS / MIB))
    gigabytes = _size(blocks) / 1e9

    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Party("server") as server:
        site_parties = {name: Party(name) for name in SITES}
        address = {"address": "localhost:8443", "also": ["127.0.0.1"]}
        provision(FederationFile(federation="massive", server=address, sites=list(SITES)), Path(folder) / "kits")
        at = server.call(start_server, folder, options.driver, blocks)
        for number, (name, party) in enumerate(site_parties.items()):
            party.call(start_site, name, at, folder, options.driver, blocks, options.slow_site if number else 0.0)
        parties = {"server": server, **site_parties}
        before = {name: party.call(_process) for name, party in parties.items()}
        watch = Watch({name: process for name, (process, _) in before.items()})
        stages: dict[str, Callable[..., None]] = {"server to sites": send_model}
        if options.mode == "lockstep":
            stages["sites to server to sites, in lockstep"] = exchange
        else:
            stages |= {"sites to server": gather, "average": average, "server to sites again": publish}
        for stage, work in stages.items():
            watch.stage(stage)
            server.start(work)
            server.result(within_s=6 * 3600.0)
        for party in site_parties.values():
            party.call(wait_done)
        watch.close()
        cpu = sum(party.call(_process)[1] - before[name][1] for name, party in parties.items())
        for party in site_parties.values():
            party.close()

    took = dict(zip(stages, np.diff([begin for _, begin in watch.stages]), strict=True))
    seconds = sum(took.values())
    moved = 3 * len(SITES) * gigabytes
    results = [
        {"name": "model", "value": round(gigabytes, 3), "unit": "GB"},
        {"name": "one round", "value": round(seconds, 1), "unit": "s"},
        *({"name": f"one round: {name}", "value": round(float(each), 1), "unit": "s"} for name, each in took.items()),
        {"name": "all streams together", "value": round(1000 * moved / seconds, 1), "unit": "MB/s"},
        {"name": "CPU of all parties", "value": round(cpu / moved, 3), "unit": "s/GB moved"},
    ]
    for name in parties:
        growth = round(watch.growth_mib(name), 1)
        results.append(
            {"name": f"growth of {name}'s memory", "value": growth, "unit": "MiB",
             "limit": round(gigabytes * 1e9 / MIB, 1), "ratio": round(growth * MIB / (gigabytes * 1e9), 6),
             "goal": GROWTH_GOAL_MIB, "met": growth < GROWTH_GOAL_MIB}
        )  # fmt: skip
    defaults = {"limit": None, "ratio": None, "goal": None, "met": None}
    report = {
        "benchmark": "massive",
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine()},
        "options": {"gigabytes": options.gigabytes, "mode": options.mode, "driver": options.driver,
                    "slow_site_mb_per_s": options.slow_site or None},
        "results": [{**defaults, **each} for each in results],
    }  # fmt: skip
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        slow = f"-slow-{options.slow_site:g}" if options.slow_site else ""
        stem = options.output / f"massive-{options.mode}-{options.gigabytes:g}{slow}"
        series = {"seconds": watch.seconds, **watch.mib}
        step = max(1, len(watch.seconds) // 400)
        series = {name: values[::step] for name, values in series.items()}
        text = json.dumps({**report, "resident_mib": series})
        Path(f"{stem}.json").write_text(text + "\n")
        title = f"{gigabytes:.0f} GB model, {options.mode}, {options.driver}: one round in {seconds:.0f} s"
        plot(watch, title, Path(f"{stem}.png"))
    for each in results:
        print(f"{each['name']:55}{each['value']:>12} {each['unit']}", file=sys.stderr)
    print(json.dumps(report))
    return 0 if all(each.get("met", True) for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
