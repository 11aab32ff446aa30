"""Measure ``fedbio simulate`` with very many sites: a thousand in the memory of a pool of two processes, in minutes.

The job embeds synthetic proteins with `esm1nv-mini` and trains the MLP ``32`` for ten rounds, one seed. Time is that of
the whole command; twice a second the memory of all its processes is looked at, what they share counted once.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MINUTES_GOAL = 10.0

JOB = """
jobs:
  - workflow: embed
    encoder: {name: esm1nv-mini}
  - workflow: classify
    training: {mlps: ["32"], seeds: [0], rounds: 10, patience: 10}
"""


MARK = "FEDBIO_BENCHMARK_RUN"


def memory_of(mark: str) -> int:
    """Return the bytes of all processes with this mark in their environment, what several share divided among them."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        # a process may end while it is looked at
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) * 1024 if found else 0
    return total


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=1_000)
    parser.add_argument("--pool", type=int, default=2, help="processes that play the sites (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "jobs.yaml")
        job.write_text(JOB)
        command = [sys.executable, "-m", "fedbio", "simulate", str(job), "-o", str(Path(folder, "run"))]
        command += ["--sites", str(args.sites), "--pool", str(args.pool)]
        begun, most = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, MARK: folder})
        while process.poll() is None:
            most = max(most, memory_of(folder))
            time.sleep(0.5)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"the simulation ended with code {process.returncode}")
        if not Path(folder, "run", "global", "model.safetensors").is_file():
            raise SystemExit("the simulation left no model")
    name = f"{args.sites} sites, embedding and 10 rounds"
    results = [
        {"name": name, "value": round(seconds / 60, 2), "unit": "min", "limit": None, "ratio": None}
        | {"goal": MINUTES_GOAL, "met": seconds <= 60 * MINUTES_GOAL},
        {"name": f"{name}: peak memory of all processes", "value": round(most / 1e6), "unit": "MB", "limit": None}
        | {"ratio": None, "goal": None, "met": None},
    ]
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine()}
    machine |= {"python": platform.python_version(), "pool": args.pool}
    print(json.dumps({"benchmark": "many_sites", "machine": machine, "results": results}))
    return 0 if all(each["met"] is not False for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
