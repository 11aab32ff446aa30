"""Measure how fast light attention is trained on one CPU core: residues per second, and against a matrix product.

Whole epochs are measured as `fedbio train` makes them: residues are read from the embeddings file by batch and
standardized, then forward, loss, backward and AdamW, on one thread and in seconds of its processor. The embeddings are
random numbers; lengths are spread as those of proteins are. Epochs and products are measured in turns in one run, and
the best turn of each counts. The limit is what the products of one convolution's shape alone would need: a step makes
four of them for each residue of the kernel, two forward and two backward.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fedbio.classifier import Residues, Standardizer, TrainData, initialize, train
from fedbio.embeddings import Embeddings, write_embeddings
from fedbio.networks import parse_network
from fedbio.results import EncoderInfo

CLASSES = 10


def write_proteins(path: Path, count: int, width: int) -> None:
    """Write random embeddings of residues: log-normal lengths, 400 in the mean and at most 1,000."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.85, 0.5, count), 40, 1_000).astype(np.int64)
    names = [f"p{number}" for number in range(count)]
    write_embeddings(
        path,
        info=EncoderInfo("random", "0" * 64, False, width, "residues", 1, "float32", 1_022, "window"),
        ids=names,
        lengths=lengths,
        digests=[hashlib.sha256(name.encode()).digest() for name in names],
        blocks=(random.standard_normal((length, width), dtype=np.float32) for length in lengths.tolist()),
        pointers=np.cumsum([0, *lengths.tolist()]),
    )


def product_seconds(width: int, filters: int) -> float:
    """Return the seconds of one residue in a product (rows, width) x (width, filters)."""
    rows = 8_192
    left, right = torch.randn(rows, width), torch.randn(width, filters)
    torch.mm(left, right)
    begun = time.process_time()
    for _ in range(8):
        torch.mm(left, right)
    return (time.process_time() - begun) / 8 / rows


def main() -> int:
    """Measure, print, and return 0: there is no goal but the limit itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["la9-32", "la9x64-32", "la1-32"], metavar="NAME")
    parser.add_argument("--width", type=int, default=256, help="of an embedding (default: %(default)s)")
    parser.add_argument("--proteins", type=int, default=128, help="in an epoch (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="the best one counts (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory(prefix="fedbio-") as folder:
        path = Path(folder) / "residues.h5"
        write_proteins(path, args.proteins, args.width)
        with Embeddings.open(path) as store:
            features = Residues.of(store, store.ids, most=1_000)
            data = TrainData(Standardizer.fit(features).apply(features), np.arange(args.proteins) % CLASSES)
            residues = int(features.lengths.sum())
            for name in args.networks:
                hidden, attention = parse_network(name)
                assert attention is not None
                parameters = initialize(args.width, hidden, CLASSES, seed=0, attention=attention)
                epoch = product = float("inf")
                for turn in range(args.turns):
                    begun = time.process_time()
                    train(parameters, data, round_number=turn)
                    epoch = min(epoch, time.process_time() - begun)
                    product = min(product, product_seconds(args.width, attention.width(args.width)))
                value, limit = residues / epoch, 1 / (4 * attention.kernel * product)
                results.append(
                    {"name": name, "value": round(value), "unit": "residues/s", "limit": round(limit),
                     "ratio": round(value / limit, 3), "goal": None, "met": None}
                )  # fmt: skip
                print(f"{name:<12} {value:>9,.0f} residues/s of {limit:,.0f} that the products alone would allow")
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    print(json.dumps({"benchmark": "attention", "machine": machine, "width": args.width, "results": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
