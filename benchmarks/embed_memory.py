"""Measure the peak memory of ``fedbio embed`` for 1,000 and for 1,000,000 proteins: it must hardly grow.

The proteins are those of the demo generator; an encoder of width 32 with one layer and random weights makes what is
measured the pipeline (reading, planning, parts, the finished file) and not the encoder. Each run is a process of its
own, whose peak resident memory the kernel tells. What grows with the proteins is a few numbers for each, and the goal
is that they take no more than 120 bytes (a smaller number of proteins has a larger share of what a block takes).

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedbio.encoder.memory import PROTEIN_BYTES
from fedbio.weights import EncoderConfig, inference_shapes, write_weights

FEW = 1_000
GOAL_BYTES_PER_PROTEIN = 120.0
TINY = EncoderConfig(name="width-32", trained=False, layers=1, heads=2, width=32, ffn=64, max_tokens=130)


def write_encoder(folder: Path) -> None:
    """Write an encoder so small that it takes no memory to speak of."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in inference_shapes(TINY).items()}
    write_weights(folder, TINY, weights)


def run(*arguments: object) -> tuple[float, int]:
    """Run ``fedbio`` in a process of its own; returns its seconds and its peak resident memory in bytes."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", "from fedbio.cli import entry; entry()", *map(str, arguments)]
    process = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"fedbio {arguments[0]} ended with code {code}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024


def embed(folder: Path, proteins: int, options: list[str]) -> tuple[float, int]:
    """Make so many proteins and embed them; returns seconds and bytes."""
    source, output = folder / f"{proteins}.fasta", folder / f"{proteins}.h5"
    run("data", "demo", "-o", source, "--count", proteins)
    taken = run("embed", source, "-o", output, "--encoder", folder / "encoder", "--threads", 1, *options)
    source.unlink()
    output.unlink()
    return taken


def main() -> int:
    """Measure both, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=1_000_000, metavar="N", help="the larger number")
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the system's place for them)")
    parser.add_argument("options", nargs="*", help="more options of `fedbio embed`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="embed-memory-") as name:
        folder = Path(name)
        write_encoder(folder / "encoder")
        few_seconds, few = embed(folder, FEW, args.options)
        many_seconds, many = embed(folder, args.proteins, args.options)
    each = max(many - few, 0) / (args.proteins - FEW)
    print(f"{FEW:,} proteins: {few / 2**20:.0f} MiB in {few_seconds:.1f} s")
    print(f"{args.proteins:,} proteins: {many / 2**20:.0f} MiB in {many_seconds:.1f} s, {each:.0f} bytes more each")
    results: list[dict[str, Any]] = [
        {
            "name": f"memory for each protein of {args.proteins:,}, beyond that for {FEW:,}",
            "value": round(each, 1),
            "unit": "bytes",
            "limit": PROTEIN_BYTES,
            "ratio": round(each / PROTEIN_BYTES, 3),
            "goal": GOAL_BYTES_PER_PROTEIN,
            "met": each <= GOAL_BYTES_PER_PROTEIN,
        },
        {
            "name": f"peak memory for {args.proteins:,} proteins against {FEW:,}",
            "value": round(many / 2**20, 1),
            "unit": "MiB",
            "limit": round(few / 2**20, 1),
            "ratio": round(many / few, 3),
            "goal": 1.5,
            "met": many / few <= 1.5,
        },
    ]
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "seconds": {str(FEW): round(few_seconds, 1), str(args.proteins): round(many_seconds, 1)},
    }
    print(json.dumps({"benchmark": "embed_memory", "machine": machine, "results": results}))
    return 0 if all(each["met"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
