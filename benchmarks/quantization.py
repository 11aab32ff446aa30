"""Measure message quantization: sizes, errors, rates, and what it costs federated averaging in accuracy.

Sizes are those of whole messages, metadata included. Errors are relative L2 norms of what a round trip loses, beside
what the scheme's definition loses: each value's nearest one in the book, by search. For ``int8`` the definition is
bitsandbytes' dynamic map of 256 values, which is what there is to beat; if bitsandbytes can be imported, its own errors
and rates are printed as well. Rates are those of one core on a whole model, from arrays to chunks and back; bytes are
counted as float32. Accuracy is that of the 512-256-128-64 classifier on DeepLoc 1.0's test proteins, with composition
features, three sites and both directions quantized; it needs the proteins (``--proteins``).

The last line of output is one JSON object in the form that README.md describes; the exit code is 0 if all goals are
met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedbio.classifier import Parameters, Standardizer, TrainData, evaluate, initialize, train
from fedbio.proteins import COMPARTMENTS, read
from fedbio.tensors import (
    SCHEMES,
    ErrorFeedback,
    LayoutReader,
    encoded_size,
    quantized_chunks,
    quantized_size,
    weighted_mean,
)
from fedbio.tensors.quantize import BOOKS, SEGMENT_VALUES, decode, encode
from fedbio.weights import ESM1NV, inference_shapes

Array = np.ndarray[Any, Any]

PROTEINS = Path(__file__).parent.parent.parent / "shared" / "data" / "deeploc" / "mixed_soft.csv.gz"
SIXTEENTH = 256  # rows of the model that rates are measured on
HIDDEN = (512, 256, 128, 64)
LETTERS = "ACDEFGHIKLMNPQRSTVWY"

PAPER_SIZES = {"float16": 50.00, "bfloat16": 50.00, "int8": 25.03, "fp4": 14.07, "nf4": 14.07}
"""Percent of float32, from the table of Xu et al. 2025 (arXiv:2511.16450) for Llama 3.2 1B."""

RATES = {"float16": 1.0, "bfloat16": 0.5, "int8": 0.5, "fp4": 0.5, "nf4": 0.5}
"""GB of float32 a second and core, to encode."""


def result(
    name: str, value: float, unit: str, *, limit: float | None = None, goal: float | None = None, met: bool = True
) -> dict[str, Any]:
    """Return one entry of the results; print it for a person."""
    ratio = None if limit is None else round(value / limit, 4)
    print(f"{name:60s} {value:10.5g} {unit:14s} limit {limit if limit is None else round(limit, 6)}", file=sys.stderr)
    return {
        "name": name,
        "value": round(value, 6),
        "unit": unit,
        "limit": None if limit is None else round(limit, 6),
        "ratio": ratio,
        "goal": goal,
        "met": met,
    }


# --- sizes ---


def llama_3_2_1b() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the paper's model."""
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (2048,)}
    for name in ("model.embed_tokens", "lm_head"):
        shapes[f"{name}.weight"] = (128_256, 2048)
    for layer in range(16):
        for name, shape in {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (512, 2048),
            "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (8192, 2048),
            "mlp.up_proj": (8192, 2048),
            "mlp.down_proj": (2048, 8192),
            "input_layernorm": (2048,),
            "post_attention_layernorm": (2048,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def sizes() -> Iterator[dict[str, Any]]:
    """Compare sizes with the paper's on its model; show them on ours, where the exact small tensors weigh more."""
    classifier = {name: array.shape for name, array in initialize(768, HIDDEN, 10, seed=0).items()}
    models = {"Llama 3.2 1B": llama_3_2_1b(), "ESM-1nv": inference_shapes(ESM1NV), "classifier": classifier}
    for model, shapes in models.items():
        parameters = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        for scheme in SCHEMES:
            percent = 100 * quantized_size(parameters, scheme) / encoded_size(parameters)
            goal = PAPER_SIZES[scheme] if model == "Llama 3.2 1B" else None
            met = goal is None or round(percent, 2) <= goal
            yield result(f"size, {scheme}, {model}", percent, "% of float32", limit=goal, goal=goal, met=met)


# --- errors ---


def relative_error(decoded: Array, values: Array) -> float:
    """Return the norm of what was lost over the norm of what there was."""
    wide = values.astype(np.float64)
    return float(np.linalg.norm(decoded - wide) / np.linalg.norm(wide))


def there_and_back(scheme: str, values: Array) -> Array:
    """Return what arrives, segment by segment as it travels."""
    parts = [values[start : start + SEGMENT_VALUES] for start in range(0, values.size, SEGMENT_VALUES)]
    return np.concatenate([decode(scheme, encode(scheme, part).data, part.size) for part in parts])


def nearest(values: Array, book: Array, block: int) -> Array:
    """Return each value's nearest in a book of shares of its block's largest magnitude, by search in float64."""
    book = np.unique(book.astype(np.float64))
    padded = np.zeros(-(-values.size // block) * block)
    padded[: values.size] = values
    rows = padded.reshape(-1, block)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    shares = rows / np.where(largest == 0, 1, largest)
    places = np.searchsorted((book[1:] + book[:-1]) / 2, shares)
    return (book[places] * largest).reshape(-1)[: values.size]


def dynamic_map() -> Array:
    """Return the 256 shares of bitsandbytes' 8-bit codes (Dettmers 2016, arXiv:1511.04561)."""
    shares = [0.0, 1.0]
    for decade in range(7):
        bounds = np.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (bounds[1:] + bounds[:-1]) / 2
        shares += [*middles, *-middles]
    return np.array(shares)


def definition(scheme: str, values: Array) -> Array:
    """Return what a scheme decodes to by its definition."""
    if scheme == "float16":
        return values.astype(np.float16)
    if scheme == "bfloat16":
        import torch

        return torch.from_numpy(values).bfloat16().float().numpy()
    return nearest(values, dynamic_map(), 4096) if scheme == "int8" else nearest(values, BOOKS[scheme], 64)


class Peer(NamedTuple):
    """bitsandbytes, on one thread."""

    version: str
    quantize: Callable[[str, Array], Any]
    round_trip: Callable[[str, Array], Array]


def bitsandbytes() -> Peer | None:
    """Return bitsandbytes if it is there."""
    try:
        import bitsandbytes as library
        import torch
        from bitsandbytes import functional
    except ImportError:
        return None

    def quantize(scheme: str, values: Array) -> Any:
        tensor = torch.from_numpy(values)
        if scheme == "int8":
            return functional.quantize_blockwise(tensor, blocksize=4096)
        return functional.quantize_4bit(tensor, blocksize=64, quant_type=scheme)

    def round_trip(scheme: str, values: Array) -> Array:
        restore = functional.dequantize_blockwise if scheme == "int8" else functional.dequantize_4bit
        return np.asarray(restore(*quantize(scheme, values)).numpy()).reshape(-1)

    torch.set_num_threads(1)
    return Peer(library.__version__, quantize, round_trip)


def tensors(trained: Parameters | None) -> dict[str, Array]:
    """Return what errors are measured on, a million values each where there are as many."""
    random, count = np.random.default_rng(0), 1 << 20
    found = {
        "normal": random.standard_normal(count),
        "uniform": random.uniform(-1, 1, count),
        "Student's t, 3": random.standard_t(3, count),
        "Laplace": random.laplace(size=count),
        "first weights": initialize(768, HIDDEN, 10, seed=0)["layers.0.weight"],
    }
    if trained is not None:
        first = initialize(trained["layers.0.weight"].shape[1], HIDDEN, len(COMPARTMENTS), seed=0)
        found["trained weights"] = trained["layers.0.weight"]
        found["update of weights"] = trained["layers.0.weight"] - first["layers.0.weight"]
    return {name: array.astype(np.float32).reshape(-1) for name, array in found.items()}


def errors(trained: Parameters | None) -> Iterator[dict[str, Any]]:
    """Compare round trips with the definitions, and with bitsandbytes where it is installed."""
    peer = bitsandbytes()
    for tensor, values in tensors(trained).items():
        for scheme, kind in SCHEMES.items():
            error = relative_error(there_and_back(scheme, values), values)
            limit = relative_error(definition(scheme, values), values)
            # a share is rounded to float32 before it is compared
            met = error <= limit * (1 + 1e-5)
            yield result(f"error, {scheme}, {tensor}", error, "relative L2", limit=limit, goal=limit, met=met)
            if peer is not None and kind.block:
                theirs = relative_error(peer.round_trip(scheme, values), values)
                name = f"error, {scheme}, {tensor}, against bitsandbytes {peer.version}"
                met = error <= theirs * (1 + 1e-5)
                yield result(name, error, "relative L2", limit=theirs, goal=theirs, met=met)


# --- rates ---


def rates(seconds: float) -> Iterator[dict[str, Any]]:
    """Time a model of 64 MiB on its way to chunks and back, against a copy of it; repeats are interleaved."""
    random = np.random.default_rng(0)
    values = random.standard_normal((4096, 4096)).astype(np.float32)
    small, copy = values * np.float32(1e-5), np.empty_like(values)
    model = {"weight": values}
    chunks = {scheme: [bytes(chunk) for chunk in quantized_chunks(model, scheme)] for scheme in SCHEMES}

    def encode_all(scheme: str) -> None:
        for _ in quantized_chunks(model, scheme):
            pass

    def decode_all(scheme: str) -> None:
        reader = LayoutReader()
        for chunk in chunks[scheme]:
            for _ in reader.feed(chunk):
                pass

    def copy_all() -> None:
        # by segments, as the kernels work, so that the target is warm in the cache
        for start in range(0, len(values), 64):
            np.copyto(copy[:64], values[start : start + 64])

    jobs: dict[str, Callable[[], object]] = {"copy": copy_all}
    for scheme in SCHEMES:
        jobs[f"encode {scheme}"] = lambda scheme=scheme: encode_all(scheme)
        jobs[f"decode {scheme}"] = lambda scheme=scheme: decode_all(scheme)
    # of these a sixteenth of the model: numpy needs half a second for the whole where results are subnormal
    jobs["numpy float16"] = lambda: values[:SIXTEENTH].astype(np.float16)
    jobs["numpy float16 of values of 1e-5"] = lambda: small[:SIXTEENTH].astype(np.float16)
    peer = bitsandbytes()
    if peer is not None:
        for scheme in (name for name, kind in SCHEMES.items() if kind.block):
            flat = values[:SIXTEENTH].reshape(-1)
            jobs[f"bitsandbytes {scheme}"] = lambda scheme=scheme, flat=flat: peer.quantize(scheme, flat)
    best = dict.fromkeys(jobs, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            best[name] = min(best[name], time.perf_counter() - started)
    whole = ("copy", "encode", "decode")
    rate = {name: values.nbytes / (1 if name.startswith(whole) else 16) / took / 1e9 for name, took in best.items()}
    for scheme in SCHEMES:
        found = rate[f"encode {scheme}"]
        goal = RATES[scheme]
        yield result(f"encode, {scheme}", found, "GB/s a core", limit=rate["copy"], goal=goal, met=found >= goal)
        back = rate[f"decode {scheme}"]
        yield result(f"decode, {scheme}", back, "GB/s a core", limit=rate["copy"], goal=found, met=back >= found)
    for name in (name for name in rate if not name.startswith(whole)):
        yield result(f"encode, {name}", rate[name], "GB/s a core", limit=rate["copy"])


# --- accuracy ---


def composition(sequence: str) -> Array:
    """Return shares of residues, of pairs, and of the residues of both ends: 540 features that need no encoder."""
    codes = np.array([LETTERS.find(letter) for letter in sequence])
    codes = codes[codes >= 0]
    windows = [codes, codes[:15], codes[:30], codes[:60], codes[-15:], codes[-30:], codes[-60:]]
    singles = [np.bincount(window, minlength=20) / max(len(window), 1) for window in windows]
    pairs = np.bincount(codes[:-1] * 20 + codes[1:], minlength=400) / max(len(codes) - 1, 1)
    return np.concatenate([*singles, pairs]).astype(np.float32)


def load(path: Path) -> tuple[TrainData, TrainData]:
    """Return the training proteins and the test proteins, standardized by the former."""
    parts: dict[bool, tuple[list[Array], list[int]]] = {False: ([], []), True: ([], [])}
    for protein in read(path, require_labels=True):
        assert protein.target is not None
        features, targets = parts[protein.set == "test"]
        features.append(composition(protein.sequence))
        targets.append(COMPARTMENTS.index(protein.target))
    arrays = {test: (np.stack(features), np.array(targets)) for test, (features, targets) in parts.items()}
    standardizer = Standardizer.fit(arrays[False][0])
    training, test = (TrainData(standardizer.apply(arrays[kind][0]), arrays[kind][1]) for kind in (False, True))
    return training, test


class Wire:
    """One direction of a connection, with the quantization of its sender."""

    def __init__(self, scheme: str | None, *, feedback: bool) -> None:
        self.scheme = scheme
        self.feedback = ErrorFeedback(scheme) if scheme is not None and feedback else None

    def carry(self, parameters: Parameters) -> Parameters:
        """Return what arrives."""
        if self.scheme is None:
            return parameters
        if self.feedback is not None:
            parameters = self.feedback.compensate(parameters)
        reader, arrived = LayoutReader(), {name: np.empty(array.size, np.float32) for name, array in parameters.items()}
        for chunk in quantized_chunks(parameters, self.scheme):
            for name, start, values in reader.feed(chunk):
                arrived[name][start : start + len(values)] = values
        reader.finish()
        return {name: array.reshape(parameters[name].shape) for name, array in arrived.items()}


def federate(
    sites: list[TrainData], scheme: str | None, *, rounds: int, seed: int, updates: bool, feedback: bool
) -> Parameters:
    """Average the sites' models for some rounds; what travels is quantized both ways.

    With `updates`, what travels is what changed: a site sends its model less the one it was given, the server what
    the mean changed; both ends add it to what they have. The first model is made from the seed at each of them.
    """
    model = initialize(sites[0].features.shape[1], HIDDEN, len(COMPARTMENTS), seed=seed)
    down, up = Wire(scheme, feedback=feedback), [Wire(scheme, feedback=feedback) for _ in sites]
    held = model  # what the sites have of it
    for number in range(rounds):
        if not updates:
            held = down.carry(model)
        elif number:
            held = add(held, down.carry(subtract(model, held)))
        arrived = []
        for place, (data, wire) in enumerate(zip(sites, up, strict=True)):
            trained = train(held, data, seed=seed, round_number=3 * number + place).parameters
            change = add(held, wire.carry(subtract(trained, held))) if updates else wire.carry(trained)
            arrived.append((f"site-{place}", change, float(len(data))))
        model = weighted_mean(arrived)
    return model


def add(left: Parameters, right: Parameters) -> Parameters:
    """Return the sums, by name."""
    return {name: array + right[name] for name, array in left.items()}


def subtract(left: Parameters, right: Parameters) -> Parameters:
    """Return the differences, by name."""
    return {name: array - right[name] for name, array in left.items()}


def accuracies(path: Path, rounds: int, seeds: int) -> tuple[list[dict[str, Any]], Parameters]:
    """Compare each scheme's test accuracy with float32's; also return a model that was trained with the latter."""
    training, test = load(path)
    scores: dict[str, list[float]] = {}
    for seed in range(seeds):
        shares = np.array_split(np.random.default_rng(seed).permutation(len(training)), 3)
        sites = [TrainData(training.features[share], training.targets[share]) for share in shares]
        for name, options in variants():
            model = federate(sites, rounds=rounds, seed=seed, **options)
            if name == "float32":
                trained = model
            scores.setdefault(name, []).append(evaluate(model, test).accuracy)
    exact = float(np.mean(scores["float32"]))
    # two standard errors of a difference of means; the spread between seeds is that of all variants, as three are few
    spread = np.mean([np.var(values, ddof=1) for values in scores.values()]) ** 0.5
    noise = 2 * float(spread) * (2 / seeds) ** 0.5
    found = []
    for name, values in scores.items():
        mean = float(np.mean(values))
        goal = exact - noise if name in SCHEMES else None
        met = goal is None or mean >= goal
        found.append(result(f"accuracy, {name}", mean, "share", limit=exact, goal=goal, met=met))
    found.append(result("accuracy, noise between seeds", noise, "share"))
    return found, trained


def variants() -> Iterable[tuple[str, dict[str, Any]]]:
    """Return the ways to federate: whole weights under each scheme, then updates under the coarsest."""
    yield "float32", {"scheme": None, "updates": False, "feedback": False}
    for scheme in SCHEMES:
        yield scheme, {"scheme": scheme, "updates": False, "feedback": False}
    yield "fp4, updates", {"scheme": "fp4", "updates": True, "feedback": False}
    yield "fp4, updates, error feedback", {"scheme": "fp4", "updates": True, "feedback": True}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="rounds of averaging (default: 8)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each scheme (default: 3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to time the rates (default: 20)")
    parser.add_argument(
        "--proteins", type=Path, default=PROTEINS, help="DeepLoc's proteins, CSV (default: %(default)s)"
    )
    args = parser.parse_args()
    results, trained = list(sizes()) + list(rates(args.seconds)), None
    skipped = {}
    if args.proteins.exists():
        found, trained = accuracies(args.proteins, args.rounds, args.seeds)
        results += found
    else:
        skipped["accuracy"] = f"{args.proteins.name} is not there; see --proteins"
    results += errors(trained)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    print(json.dumps({"benchmark": "quantization", "machine": machine, "skipped": skipped, "results": results}))
    return 0 if all(each["met"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
