"""Measure how long the encoder that comes with fedbio takes to load: found by name, read, and held to its SHA-256.

Each time in a process of its own, after its imports; beside it what reading and hashing the file take alone. The last
line of output is one JSON object in the form that README.md describes; the exit code is 0 if the goal is met.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys

from fedbio.encoder_names import DEFAULT_ENCODER

SECONDS_GOAL = 1.0

TIMES = 9

LOAD = """
import sys, time
from fedbio.encoder import load_encoder_weights
import fedbio.encoder.checkpoint
begun = time.perf_counter()
load_encoder_weights(sys.argv[1])
print(time.perf_counter() - begun)
"""

BARE = """
import hashlib, sys, time
from pathlib import Path
import fedbio.encoders as encoders
begun = time.perf_counter()
hashlib.sha256(Path(next(iter(encoders.__path__)), sys.argv[1], "model.safetensors").read_bytes()).digest()
print(time.perf_counter() - begun)
"""


def median_of(program: str) -> float:
    """Return the seconds that a program tells, the median of several processes."""
    command = [sys.executable, "-c", program, DEFAULT_ENCODER]
    told = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(TIMES)]
    return statistics.median(map(float, told))


def main() -> int:
    """Measure and print."""
    seconds, limit = median_of(LOAD), median_of(BARE)
    result = {"name": f"loading {DEFAULT_ENCODER}", "value": round(seconds, 4), "unit": "s", "limit": round(limit, 4)}
    result |= {"ratio": round(seconds / limit, 2), "goal": SECONDS_GOAL, "met": seconds <= SECONDS_GOAL}
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine()}
    machine |= {"python": platform.python_version()}
    print(json.dumps({"benchmark": "load_encoder", "machine": machine, "results": [result]}))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
