"""Measure the transport against bare loops on this machine: rates, latencies, processor time and memory.

Server and sites are processes of their own on loopback. Each figure has its limit from the same run: a bare loop with
the same chunks, direction and encryption that computes the same CRC32 and BLAKE3 (see `_bare.py`). Loops take turns
after one round of warm-up, and medians are compared; the CPU seconds of both ends together are reported per GB, the
steadier figure on a machine that others use too. Loops without the checks are printed for orientation.

``rates``     one stream, both directions, by driver, with mutual TLS; TCP also without
``latency``   a request of 64 bytes and its reply
``files``     a file to a file, against the slower of bare link and disk while both run
``sites``     one model to several sites at once: it is read, quantized and hashed once
``memory``    growth of peak resident memory at both ends: file to file, items to a consumer, a model in memory

Examples::

    python benchmarks/transport.py
    python benchmarks/transport.py --only rates --drivers grpc --gigabytes 2 --repeats 9

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _bare
import numpy as np
from _processes import Party, cpu_seconds

from fedbio.provision import provision
from fedbio.settings import FederationFile
from fedbio.transport import (
    BlobPayload,
    ConsumerSink,
    Credentials,
    FilePayload,
    FileSink,
    MemorySink,
    ObjectPayload,
    ObjectSink,
    Received,
    ServerEndpoint,
    SiteEndpoint,
    TensorPayload,
)
from fedbio.transport.credentials import Unencrypted

MIB = 1 << 20
GROUPS = ("rates", "latency", "files", "sites", "memory")
SITES = ("site-1", "site-2", "site-3")
PAIRS = 4
"""Pairs of new processes for the rates of a link."""

LEAST_RATIO = 0.8
REPLY_GOAL_MS = 1.0
GROWTH_GOAL_MIB = 64
ITEM_BYTES = 64 * MIB
REQUEST = b"r" * 64

Work = Callable[[], float]


# what runs at the parties


def start_server(state: dict[str, Any], kit: str, folder: str, driver: str, tls: bool) -> str:
    """Start an endpoint that takes whatever is sent; return its address."""

    def answer(received: Received) -> None:
        if received.topic == "ask":
            endpoint.send(received.peer, "answer", received.body)

    endpoint = ServerEndpoint(
        "127.0.0.1:0",
        Credentials.from_kit(kit) if tls else Unencrypted("server"),
        spool=f"{folder}/spool-server",
        on_message=answer,
        sinks=_sinks(folder, state),
        driver=driver,
    ).start()
    state["endpoint"] = state[driver, tls] = endpoint
    return endpoint.address


def start_site(state: dict[str, Any], kit: str, folder: str, address: str, driver: str, tls: bool) -> None:
    """Connect a site."""
    state["answers"] = threading.Semaphore(0)
    state["endpoint"] = state[driver, tls] = SiteEndpoint(
        address,
        Credentials.from_kit(kit) if tls else Unencrypted(Path(kit).name),
        spool=f"{folder}/spool-{Path(kit).name}",
        on_message=lambda received: state["answers"].release() if received.topic == "answer" else None,
        sinks=_sinks(folder, state),
        driver=driver,
    ).start()


def _sinks(folder: str, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "consume": lambda opening: ConsumerSink(lambda chunk: None, waits=False),
        "file": lambda opening: FileSink(f"{folder}/arrived", opening),
        "items": lambda opening: ObjectSink(lambda name, array: None),
        "memory": lambda opening: MemorySink(opening.size),
    }


def stop(state: dict[str, Any], driver: str, tls: bool) -> None:
    """Close an endpoint."""
    state.pop((driver, tls)).close()


def send(state: dict[str, Any], driver: str, tls: bool, peer: str | None, topic: str, payload: Any) -> float:
    """Send a payload and wait until it is acknowledged whole; return the seconds."""
    to = () if peer is None else (peer,)
    started = time.perf_counter()
    state[driver, tls].send(*to, topic, b"", payload)
    return time.perf_counter() - started


def send_blob(state: dict[str, Any], size: int, driver: str, tls: bool, peer: str | None) -> float:
    """Send the blob that `_bare` sends, too."""
    _bare.make_blob(state, size)
    return send(state, driver, tls, peer, "consume", BlobPayload(state["blob"]))


def send_file(state: dict[str, Any], path: str, driver: str, peer: str | None) -> float:
    """Send a file to a file."""
    return send(state, driver, True, peer, "file", FilePayload(path))


def remove(state: dict[str, Any], path: str) -> None:
    """Remove a file, if it is there."""
    Path(path).unlink(missing_ok=True)


def send_items(state: dict[str, Any], count: int, driver: str, peer: str | None) -> float:
    """Send large items, each made when its turn has come."""
    items = ((f"layer {number}", np.full(ITEM_BYTES // 4, number, np.float32)) for number in range(count))
    return send(state, driver, True, peer, "items", ObjectPayload(items))


def make_model(state: dict[str, Any], size: int) -> None:
    """Keep a model in memory."""
    random = np.random.default_rng(0)
    state["model"] = {f"layer {n}": random.random(4 * MIB, np.float32) for n in range(-(-size // (16 * MIB)))}


def send_model(state: dict[str, Any], driver: str, peer: str | None) -> float:
    """Send that model to memory."""
    return send(state, driver, True, peer, "memory", TensorPayload(state["model"]))


def send_to_all(state: dict[str, Any], driver: str, peers: tuple[str, ...], scheme: str | None) -> tuple[float, ...]:
    """Send one model to several sites at once; return the seconds, the CPU seconds here, and how often it was made."""
    payload = CountedPayload(state["model"], scheme)
    threads = [
        threading.Thread(target=send, args=(state, driver, True, peer, "consume", payload), daemon=True)
        for peer in peers
    ]
    cpu, started = cpu_seconds(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert payload.size is not None
    return time.perf_counter() - started, cpu_seconds() - cpu, payload.made / payload.size


class CountedPayload(TensorPayload):
    """A model that counts the bytes it was asked for."""

    made = 0

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        for chunk in super().chunks(start):
            self.made += len(chunk)
            yield chunk


def ask(state: dict[str, Any], driver: str, count: int) -> list[float]:
    """Send requests and wait for the replies, one after the other; return the seconds of each."""
    endpoint, answers = state[driver, True], state["answers"]
    times = []
    for _ in range(count):
        started = time.perf_counter()
        endpoint.send("ask", REQUEST)
        answers.acquire()
        times.append(time.perf_counter() - started)
    return times


# what compares them


class Figure(NamedTuple):
    """Medians over the repeats."""

    rate: float
    """MB/s."""
    cpu: float
    """CPU seconds of all parties per GB."""


class Turns:
    """Seconds, and processor time of all parties, of each turn of several loops."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def take(self, parties: list[Party], loops: dict[str, Work], repeats: int) -> None:
        """Let loops take turns, after one round of warm-up."""
        for turn in range(-1, repeats):
            for name, loop in loops.items():
                before = sum(party.cpu_seconds() for party in parties)
                took = loop()
                if turn >= 0:
                    self.seconds.setdefault(name, []).append(took)
                    self.cpu.setdefault(name, []).append(sum(party.cpu_seconds() for party in parties) - before)

    def figures(self, size: int) -> dict[str, Figure]:
        """Return the medians, and print them."""
        found = {}
        for name in self.seconds:
            rate, cost = (
                size / statistics.median(self.seconds[name]) / 1e6,
                statistics.median(self.cpu[name]) / size * 1e9,
            )
            found[name] = Figure(rate, cost)
            print(f"  {name:42s} {rate:8.0f} MB/s {cost:8.2f} CPU s/GB", flush=True)
        return found


class Benchmark:
    """The parties, their kits and the results so far."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.size = int(args.gigabytes * 1e9)
        self.repeats: int = args.repeats
        self.drivers: list[str] = args.drivers
        self.results: list[dict[str, Any]] = []
        settings = {"address": "localhost:8443", "also": ["127.0.0.1"]}
        provision(FederationFile(federation="benchmark", server=settings, sites=list(SITES)), folder / "kits")

    def kit(self, party: str) -> str:
        """Return where a party's start-up kit is."""
        return str(self.folder / "kits" / party)

    def connect(self, server: Party, *sites: Party, driver: str = "grpc", tls: bool = True) -> None:
        """Start endpoints at the parties."""
        address = server.call(start_server, self.kit("server"), str(self.folder), driver, tls)
        for site in sites:
            site.call(start_site, self.kit(site.name), str(self.folder), address, driver, tls)

    def compare_anew(self, make_loops: Callable[[Party, Party], dict[str, Work]]) -> dict[str, Figure]:
        """Let loops take turns, at several pairs of new processes one after the other."""
        turns = Turns()
        for _ in range(PAIRS):
            with Party("server") as server, Party("site-1") as site:
                turns.take([server, site], make_loops(server, site), -(-self.repeats // PAIRS))
        return turns.figures(self.size)

    def compare(self, parties: list[Party], loops: dict[str, Work], size: int | None = None) -> dict[str, Figure]:
        """Let loops take turns, after one round of warm-up."""
        turns = Turns()
        turns.take(parties, loops, self.repeats)
        return turns.figures(size or self.size)

    def report(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        limit: float | None = None,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """Keep a result; its goal is the least ratio to the limit, or the most that the value may be, or none."""
        ratio = None if limit is None else value / limit
        met = (least is None or (ratio or 0.0) >= least) and (most is None or value <= most)
        self.results.append(
            {
                "name": name,
                "value": round(value, 4),
                "unit": unit,
                "limit": None if limit is None else round(limit, 4),
                "ratio": None if ratio is None else round(ratio, 3),
                "goal": most if least is None else least,
                "met": met if least is not None or most is not None else None,
            }
        )

    def report_rate(self, name: str, ours: Figure, bare: Figure, least: float | None = LEAST_RATIO) -> None:
        """Keep a rate and its cost."""
        self.report(name, ours.rate, "MB/s", limit=bare.rate, least=least)
        self.report(f"{name}: CPU", ours.cpu, "s/GB", limit=bare.cpu)


def measure_rates(bench: Benchmark) -> None:
    """One stream from memory to a consumer, against the bare loop of the same kind.

    How fast a process is depends on where its memory and its threads happen to lie: each turn of several has new ones.
    """
    links = [(driver, True) for driver in bench.drivers] + [("tcp", False)] * ("tcp" in bench.drivers)
    for driver, tls in links:
        for upwards in (True, False):
            name = f"{driver}{'' if tls else ' without TLS'}, {'site to server' if upwards else 'server to site'}"
            print(name)
            figures = bench.compare_anew(functools.partial(_rate_loops, bench, driver, tls, upwards))
            # a WebSocket has no bare loop of its own, and a link without TLS no goal: both are for orientation
            least = LEAST_RATIO if driver in ("grpc", "tcp") and tls else None
            bench.report_rate(name, figures["ours"], figures["bare"], least)
            unchecked = figures["bare, without checks"].rate
            bench.report(f"{name}: against a loop without checks", figures["ours"].rate, "MB/s", limit=unchecked)


def _rate_loops(bench: Benchmark, driver: str, tls: bool, upwards: bool, server: Party, site: Party) -> dict[str, Work]:
    bench.connect(server, site, driver=driver, tls=tls)
    if driver == "grpc":
        site.call(_bare.grpc_dial, bench.kit("site-1"), server.call(_bare.grpc_listen, bench.kit("server")))
        bare = functools.partial(site.call, _bare.grpc_loop, bench.size)
    else:
        port = server.call(_bare.socket_listen, bench.kit("server"), tls=tls)
        site.call(_bare.socket_dial, bench.kit("site-1"), port, tls=tls)
        bare = functools.partial(site.call, _bare.socket_loop, bench.size, tls=tls)
    sender = site if upwards else server
    sender.call(_bare.make_blob, bench.size)
    to = None if upwards else "site-1"
    return {
        "bare": functools.partial(bare, upwards=upwards, checks=True),
        "ours": functools.partial(sender.call, send_blob, bench.size, driver, tls, to),
        "bare, without checks": functools.partial(bare, upwards=upwards, checks=False),
    }


def measure_latency(bench: Benchmark, count: int = 1000) -> None:
    """A small request and its reply, against an echo on a bare stream."""
    with Party("server") as server, Party("site-1") as site:
        site.call(_bare.grpc_dial, bench.kit("site-1"), server.call(_bare.grpc_listen, bench.kit("server")))
        for driver in bench.drivers:
            bench.connect(server, site, driver=driver)
        loops = {"bare gRPC echo": functools.partial(site.call, _bare.grpc_times, REQUEST)}
        loops |= {driver: functools.partial(site.call, ask, driver) for driver in bench.drivers}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(-1, bench.repeats):
            for name, loop in loops.items():
                took = loop(count)
                times[name] += took if turn >= 0 else []
    print("request and reply")
    echo = statistics.median(times["bare gRPC echo"]) * 1e3
    for name, took in times.items():
        median, last = statistics.median(took) * 1e3, statistics.quantiles(took, n=100)[98] * 1e3
        print(f"  {name:42s} {median:8.3f} ms median {last:8.3f} ms p99", flush=True)
        if name in bench.drivers:
            most = REPLY_GOAL_MS if name == "grpc" else None
            bench.report(f"{name}, request and reply, median", median, "ms", limit=echo, most=most)
            bench.report(f"{name}, request and reply, p99", last, "ms")


def measure_files(bench: Benchmark) -> None:
    """A file at a site to a file at the server, safe on the disk, against the slower of bare link and disk.

    A transfer keeps both busy at the same time, and on few cores they compete for the processors. So the limit is the
    slower of the two while both run; each by itself is printed for orientation.
    """
    source, target = str(bench.folder / "source"), str(bench.folder / "target")
    write_file(Path(source), bench.size)
    for driver in bench.drivers:
        with Party("server") as server, Party("site-1") as site, Party("disk") as disk:
            bench.connect(server, site, driver=driver)
            if driver == "grpc":
                site.call(_bare.grpc_dial, bench.kit("site-1"), server.call(_bare.grpc_listen, bench.kit("server")))
                link = functools.partial(site.call, _bare.grpc_loop, bench.size, upwards=True, checks=True)
            else:
                port = server.call(_bare.socket_listen, bench.kit("server"), tls=True)
                site.call(_bare.socket_dial, bench.kit("site-1"), port, tls=True)
                link = functools.partial(site.call, _bare.socket_loop, bench.size, tls=True, upwards=True, checks=True)
            name = f"{driver}, file to file"
            print(name)
            copy = functools.partial(disk.call, _bare.copy_file, source, target)

            def at_once(disk: Party = disk, link: Work = link) -> float:
                disk.start(_bare.copy_file, source, target, safe=True)
                took = link()
                return max(took, disk.result())

            def ours(server: Party = server, site: Party = site, driver: str = driver) -> float:
                # giving back the space of a file that the new one replaces is no part of a transfer
                server.call(remove, f"{bench.folder}/arrived")
                return float(site.call(send_file, source, driver, None))

            loops: dict[str, Work] = {
                "bare link": link,
                "bare disk, until safe": functools.partial(copy, safe=True),
                "bare disk, page cache": functools.partial(copy, safe=False),
                "bare link and disk at once": at_once,
                "ours": ours,
            }
            figures = bench.compare([server, site, disk], loops)
            limit = figures["bare link and disk at once"]
            bench.report_rate(name, figures["ours"], limit, LEAST_RATIO if driver in ("grpc", "tcp") else None)
            alone = min(figures["bare link"], figures["bare disk, until safe"])
            bench.report_rate(f"{name}: against the slower of both, each by itself", figures["ours"], alone, None)
    Path(source).unlink()
    (bench.folder / "arrived").unlink()


def measure_sites(bench: Benchmark) -> None:
    """One model to one site and to three, exact and quantized."""
    with Party("server") as server, Party("site-1") as one, Party("site-2") as two, Party("site-3") as three:
        sites = (one, two, three)
        bench.connect(server, *sites)
        server.call(make_model, bench.size)
        for scheme in (None, "nf4"):
            what = f"a model{f' in {scheme}' if scheme else ''}"
            found: dict[int, list[tuple[float, ...]]] = {1: [], 2: [], 3: []}
            for turn in range(-1, bench.repeats):
                for count, figures in found.items():
                    took = server.call(send_to_all, "grpc", SITES[:count], scheme)
                    figures += [took] * (turn >= 0)
            print(f"{what} to several sites")
            medians = {
                count: [statistics.median(column) for column in zip(*figures, strict=True)]
                for count, figures in found.items()
            }
            for count, (seconds, cpu, made) in medians.items():
                print(
                    f"  {count} site{'s' * (count > 1):41s} {seconds:7.2f} s {cpu:7.2f} CPU s at the server, "
                    f"made {made:.2f} times",
                    flush=True,
                )
            for count in (2, 3):
                seconds, cpu, made = medians[count]
                bench.report(f"{what} to {count} sites: seconds, those to one", seconds, "s", limit=medians[1][0])
                bench.report(f"{what} to {count} sites: server's CPU, that to one", cpu, "s", limit=medians[1][1])
                bench.report(f"{what} to {count} sites: times made", made, "times", most=1.0)


def measure_memory(bench: Benchmark, gigabytes: float) -> None:
    """Growth of peak resident memory at both ends."""
    source = str(bench.folder / "source")
    write_file(Path(source), int(2 * gigabytes * 1e9))
    items = int(gigabytes * 1e9) // ITEM_BYTES
    item_mib = ITEM_BYTES // MIB
    model = int(gigabytes * 1e9)
    cases = [
        ("file to file", send_file, (source,), GROWTH_GOAL_MIB, GROWTH_GOAL_MIB),
        ("items to a consumer", send_items, (items,), item_mib + GROWTH_GOAL_MIB, item_mib + GROWTH_GOAL_MIB),
        ("model in memory", send_model, (), GROWTH_GOAL_MIB, model // MIB + GROWTH_GOAL_MIB),
    ]
    print("growth of peak resident memory")
    for driver in bench.drivers:
        for name, function, args, *goals in cases:
            with Party("server") as server, Party("site-1") as site:
                bench.connect(server, site, driver=driver)
                if function is send_model:
                    server.call(make_model, model)
                server.call(send_blob, 64 * MIB, driver, True, "site-1")
                before = [party.reset_peak_rss() for party in (server, site)]
                server.call(function, *args, driver, "site-1")
                growth = [(party.peak_rss() - held) / MIB for party, held in zip((server, site), before, strict=True)]
            print(f"  {driver}, {name:38s} {growth[0]:8.0f} MiB sender {growth[1]:8.0f} MiB receiver", flush=True)
            for end, grown, goal in zip(("sender", "receiver"), growth, goals, strict=True):
                bench.report(f"{driver}, {name}: growth at the {end}", grown, "MiB", most=goal)
    Path(source).unlink()


def write_file(path: Path, size: int) -> None:
    """Write random bytes."""
    block = os.urandom(16 * MIB)
    with open(path, "wb") as file:
        for begin in range(0, size, len(block)):
            file.write(block[: size - begin])
        os.fsync(file.fileno())


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.3, help="GB of one transfer (default: 0.3)")
    parser.add_argument("--repeats", type=int, default=8, help="turns of each loop after the warm-up (default: 8)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="what to measure (default: all)")
    parser.add_argument("--drivers", nargs="+", default=["grpc", "tcp", "http"], help="default: grpc tcp http")
    parser.add_argument("--memory-gigabytes", type=float, default=1.0, help="GB in memory; files have twice as many")
    parser.add_argument("--folder", type=Path, help="where files are written (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedbio-transport-", dir=args.folder) as folder:
        bench = Benchmark(Path(folder), args)
        measures: dict[str, Callable[[], None]] = {
            "rates": lambda: measure_rates(bench),
            "latency": lambda: measure_latency(bench),
            "files": lambda: measure_files(bench),
            "sites": lambda: measure_sites(bench),
            "memory": lambda: measure_memory(bench, args.memory_gigabytes),
        }
        for group in args.only:
            measures[group]()
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    for missed in (each for each in bench.results if each["met"] is False):
        print(f"missed: {missed['name']}: {missed['value']} {missed['unit']}, ratio {missed['ratio']}")
    print(json.dumps({"benchmark": "transport", "machine": machine, "results": bench.results}))
    return 0 if all(each["met"] is not False for each in bench.results) else 1


if __name__ == "__main__":
    sys.exit(main())
