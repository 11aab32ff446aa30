"""Measure what is lost when an encoder's weights are kept in half or a quarter of their room.

For each form of `fedbio encoder convert --weights`: the bytes of the file, and the least cosine of proteins' means to
those of the float32 weights, as they are and after the mean of all proteins was subtracted. Inference is in float32
throughout. Take an encoder whose weights are float32: one that was rounded before loses nothing more.

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if the goal is met.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
from embed import cosines, result
from numpy.typing import NDArray

from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.proteins import read
from fedbio.proteins.demo import generate
from fedbio.weights import EncoderConfig, Weights, read_weights, write_weights
from fedbio.weights_file import WeightForm

GOALS = {"float16": 0.99999, "int8": 0.9999}
"""Of the centred cosine; bfloat16 arithmetic, which is the default where it is fast, is held to 0.999."""


def means(folder: Path, sequences: list[bytes]) -> NDArray[np.float32]:
    """Embed with the weights of a folder, in float32; shape (proteins, D)."""
    setup = Setup(EncoderChoice(encoder=folder, device="cpu", dtype="float32", long="cut"))
    plan, inference = setup.plan(sequences), setup.inference()
    sums = np.concatenate(list(inference.packs(sequences, plan, range(len(plan.packs) - 1))))
    found = np.empty_like(sums)
    found[plan.protein] = sums / (plan.end - plan.begin)[:, None]
    return found


def measure(folder: Path, config: EncoderConfig, weights: Weights, sequences: list[bytes]) -> list[dict[str, Any]]:
    """Return the lines of results."""
    lines: list[dict[str, Any]] = []
    exact: NDArray[np.float32] | None = None
    whole = 0
    for form in get_args(WeightForm):
        write_weights(folder / form, config, weights, form)
        size = (folder / form / "model.safetensors").stat().st_size
        found = means(folder / form, sequences)
        if exact is None:
            exact, whole = found, size
            continue
        plain, centred = cosines(found, exact)
        lines.append(result(f"{form} bytes against float32", size, whole, "bytes", None))
        lines.append(result(f"{form} cosine", plain, 1, "", None))
        lines.append(result(f"{form} centred cosine", centred, 1, "", GOALS[form]))
    return lines


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path, help="fedbio folder of an encoder in float32")
    parser.add_argument("--proteins", type=Path, help="file of proteins to embed (default: demo proteins)")
    parser.add_argument("--count", type=int, default=240, help="how many of them, drawn by chance (default: 240)")
    args = parser.parse_args()
    proteins = [each.sequence for each in (read(args.proteins) if args.proteins else generate(args.count, seed=1))]
    chosen = np.random.default_rng(1).permutation(len(proteins))[: args.count]
    config, weights = read_weights(args.encoder)
    sequences = [proteins[number][: config.max_residues].encode() for number in chosen]
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), config, weights, sequences)
    machine = {"python": platform.python_version(), "encoder": config.name, "proteins": len(sequences)}
    print(json.dumps({"benchmark": "rounded_weights", "machine": machine, "results": lines}))
    return 0 if all(each["met"] for each in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
