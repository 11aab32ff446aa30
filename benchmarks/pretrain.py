"""Measure how fast encoders are pre-trained: tokens per second, and against this machine's own matrix product.

Whole updates are measured, as `fedbio pretrain` makes them: masking and packing on a thread of its own, forward, loss
on the masked residues, backward, clipping, AdamW, averaging. No protein attends to another. Updates and products are
measured in turns in one run, and the best turn of each counts. The limit is the product of the feed-forward network's
shape in the arithmetic of the training; useful operations are three times those of the encoder on real tokens.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F

from fedbio.encoder.estimate import operations
from fedbio.encoder.inference import choose_device, choose_dtype
from fedbio.encoder.pretraining.allocation import keep_freed_memory
from fedbio.encoder.pretraining.batches import Packs, Place
from fedbio.encoder.pretraining.beginning import first_weights
from fedbio.encoder.pretraining.corpus import Inputs, Proteins, corpus_of
from fedbio.encoder.pretraining.feed import portions
from fedbio.encoder.pretraining.learner import Learner
from fedbio.encoder.pretraining.masking import Masker
from fedbio.encoder.pretraining.recipe import PRESETS
from fedbio.proteins import write_fasta
from fedbio.proteins.demo import generate

TOKENS_GOALS = {"esm1nv-44m": 1_900, "esm1nv-mini": 7_500}
"""Tokens per second of two CPU cores with AVX-512-BF16 or AMX."""

PRODUCT_GOALS: dict[str, float | None] = {"cpu": None, "cuda": 0.4}
"""Share of the matrix product."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long a piece of work takes, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def measure(preset: str, proteins: Proteins, device: torch.device, dtype: torch.dtype, turns: int) -> dict[str, float]:
    """Measure one preset: tokens per second, and GFLOP/s of training and of the product."""
    config, recipe = PRESETS[preset].config, PRESETS[preset].recipe
    name = str(dtype).removeprefix("torch.")
    pack_tokens = recipe.pack_tokens if device.type == "cuda" else min(recipe.pack_tokens, 8_192)
    recipe = msgspec.structs.replace(recipe, dtype=name, pack_tokens=pack_tokens)
    learner = Learner(config, first_weights(config, 0), recipe, device=device)
    masker = Masker(
        config.alphabet,
        share=recipe.mask_share,
        mask_token_share=recipe.mask_token_share,
        random_share=recipe.random_share,
    )
    packs = Packs(
        proteins,
        alphabet=config.alphabet,
        masker=masker,
        max_residues=config.max_residues,
        budget=pack_tokens,
        seed=0,
    )
    x = torch.randn(pack_tokens, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.ffn, config.width, device=device, dtype=dtype)
    product = 10 * 2.0 * pack_tokens * config.width * config.ffn
    best = {"tokens_per_second": 0.0, "training": 0.0, "product": 0.0}
    with portions(packs, Place(), packs_per_update=recipe.packs, pinned=device.type == "cuda") as coming:
        for turn in range(turns + 1):
            portion = next(coming)
            lengths = [length for batch in portion.batches for count, length in batch.runs for _ in range(count)]
            useful = 3.0 * float(operations(config, np.array(lengths, dtype=float)).sum())

            def update(batches: list[Any] = portion.batches) -> None:
                for batch in batches:
                    learner.add(batch)
                learner.update()

            taken = seconds(update, device)
            multiplied = seconds(lambda: [F.linear(x, weight) for _ in range(10)], device)
            if turn:  # the first warms up
                best["tokens_per_second"] = max(best["tokens_per_second"], portion.tokens / taken)
                best["training"] = max(best["training"], useful / taken / 1e9)
                best["product"] = max(best["product"], product / multiplied / 1e9)
    return best


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="proteins to learn from (default: demo proteins)")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="(default: all)")
    parser.add_argument("--turns", type=int, default=5, help="updates that are measured (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that are allowed)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    keep_freed_memory()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        source = args.file or Path(folder) / "demo.fasta"
        if args.file is None:
            write_fasta(generate(20_000 if device.type == "cuda" else 4_000, seed=1), source)
        corpus = corpus_of(Path(folder) / "corpus", Inputs(sources=[source], valid_fraction=0.0))
        for preset in args.presets:
            found = measure(preset, corpus.train, device, dtype, args.turns)
            if device.type == "cpu":
                goal = TOKENS_GOALS[preset]
                results.append(result(f"{preset}: whole updates", found["tokens_per_second"], goal, "tokens/s", 1.0))
            else:
                print(f"{preset}: {found['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
            against = f"{preset}: {str(dtype).removeprefix('torch.')} updates against the matrix product"
            share = PRODUCT_GOALS[device.type]
            results.append(result(against, found["training"], found["product"], "GFLOP/s", share))
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name()
        if device.type == "cuda"
        else torch.cpu.get_capabilities()["cpu_name"],
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "proteins": len(corpus.train),
    }
    print(json.dumps({"benchmark": "pretrain", "machine": machine, "results": results}))
    return 0 if all(each["met"] is not False for each in results) else 1


def result(name: str, value: float, limit: float, unit: str, goal: float | None) -> dict[str, Any]:
    """One line of the results: a value, what it is compared with, and whether their ratio reaches a goal."""
    return {
        "name": name,
        "value": round(value, 1),
        "unit": unit,
        "limit": round(limit, 1),
        "ratio": round(value / limit, 3),
        "goal": goal,
        "met": None if goal is None else value / limit >= goal,
    }


if __name__ == "__main__":
    sys.exit(main())
