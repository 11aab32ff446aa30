"""Measure how fast proteins become embeddings: against this machine's matrix product and against fair-esm.

Everything is measured in one run, in turns, and the best turn of each counts, so that other work on the machine falls
on all alike. The limit is the float32 (on CUDA: bfloat16) product of the feed-forward network's shape; useful
operations are those of the encoder on real residues, without padding. fair-esm runs a network of the same size over the
same proteins as its extract script does: sorted by length, 4,096 tokens in a padded batch, all residues averaged.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedbio.encoder.estimate import operations
from fedbio.encoder.packs import ENDS
from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.proteins import read
from fedbio.proteins.demo import generate

ROWS = {"cpu": 2048, "cuda": 65_536}
FAIR_ESM_TOKENS = 4096


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long a piece of work takes, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def ours(setup: Setup, sequences: list[bytes]) -> Callable[[], object]:
    """Embed all packs once."""
    plan, inference = setup.plan(sequences), setup.inference()
    return lambda: [inference.pack(sequences, plan, number) for number in range(len(plan.packs) - 1)]


def product(setup: Setup) -> tuple[Callable[[], object], float]:
    """Multiply ten times in the shape of the feed-forward network; returns the work and its operations."""
    rows, width, ffn = ROWS[setup.device.type], setup.config.width, setup.config.ffn
    x = torch.randn(rows, width, device=setup.device, dtype=setup.dtype)
    weight = torch.randn(ffn, width, device=setup.device, dtype=setup.dtype)
    return lambda: [F.linear(x, weight) for _ in range(10)], 10 * 2.0 * rows * width * ffn


def fair_esm(setup: Setup, sequences: list[bytes]) -> Callable[[], object]:
    """Embed all proteins once with fair-esm's BERT of the same size, as its extract script does."""
    import esm

    options = argparse.Namespace(
        arch="roberta_large",
        layers=setup.config.layers,
        embed_dim=setup.config.width,
        ffn_embed_dim=setup.config.ffn,
        attention_heads=setup.config.heads,
        max_positions=setup.config.max_tokens,
        token_dropout=True,
    )
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    model = esm.ProteinBertModel(options, alphabet).eval().to(setup.device)
    convert = alphabet.get_batch_converter(setup.config.max_residues)
    cut = [(str(number), residues.decode()) for number, residues in enumerate(sequences)]
    batches = esm.FastaBatchedDataset(*zip(*cut, strict=True)).get_batch_indices(FAIR_ESM_TOKENS, extra_toks_per_seq=1)

    def run() -> list[Any]:
        means = []
        for batch in batches:
            _, _, tokens = convert([cut[number] for number in batch])
            hidden = model(tokens.to(setup.device), repr_layers=[options.layers])["representations"][options.layers]
            means += [row[1 : 1 + len(cut[number][1])].mean(0).cpu() for row, number in zip(hidden, batch, strict=True)]
        return means

    return run


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="proteins to embed (default: demo proteins)")
    parser.add_argument("--proteins", type=int, default=60, help="how many at most (default: 60)")
    parser.add_argument("--turns", type=int, default=3, help="how often all is measured (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that are allowed)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    args = parser.parse_args()
    proteins = [each.sequence for each in (read(args.file) if args.file else generate(args.proteins, seed=1))]
    chosen = np.random.default_rng(1).permutation(len(proteins))[: args.proteins]
    setup = Setup(EncoderChoice(device=args.device, dtype=args.dtype, threads=args.threads))
    sequences = [proteins[number][: setup.config.max_residues].encode() for number in chosen]
    residues = sum(map(len, sequences))
    useful = float(operations(setup.config, np.array([len(each) + ENDS for each in sequences], dtype=float)).sum())

    works = {"fedbio": ours(setup, sequences)}
    works["product"], product_operations = product(setup)
    if importlib.util.find_spec("esm"):
        works["fair-esm"] = fair_esm(setup, sequences)
    best = dict.fromkeys(works, float("inf"))
    with torch.inference_mode():
        for turn in range(args.turns + 1):  # the first warms up
            for name, work in works.items():
                taken = seconds(work, setup.device)
                best[name] = min(best[name], taken) if turn else best[name]

    goal = 0.5 if setup.device.type == "cuda" else 0.75
    results = [
        result(
            f"{str(setup.dtype).removeprefix('torch.')} inference against the matrix product",
            useful / best["fedbio"] / 1e9,
            product_operations / best["product"] / 1e9,
            "GFLOP/s",
            goal,
        )
    ]
    if "fair-esm" in best:
        limit = residues / best["fair-esm"]
        results.append(result("inference against fair-esm", residues / best["fedbio"], limit, "residues/s", 1.2))
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name()
        if setup.device.type == "cuda"
        else torch.cpu.get_capabilities()["cpu_name"],
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "proteins": len(sequences),
        "residues": residues,
    }
    print(json.dumps({"benchmark": "embed", "machine": machine, "results": results}))
    return 0 if all(each["met"] for each in results) else 1


def result(name: str, value: float, limit: float, unit: str, goal: float) -> dict[str, Any]:
    """One line of the results: a value, what it is compared with, and whether their ratio reaches the goal."""
    return {
        "name": name,
        "value": round(value, 1),
        "unit": unit,
        "limit": round(limit, 1),
        "ratio": round(value / limit, 3),
        "goal": goal,
        "met": value / limit >= goal,
    }


if __name__ == "__main__":
    sys.exit(main())
