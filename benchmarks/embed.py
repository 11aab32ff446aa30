"""Measure how fast proteins become embeddings: against this machine's matrix product, fair-esm and transformers.

Everything is measured in one run, in turns, and the best turn of each counts, so that other work on the machine falls
on all alike. Peers run networks of the same size over the same proteins, sorted by length, in padded batches:
fair-esm's ProteinBertModel with 4,096 tokens, as its extract script does, and transformers' EsmModel in float32 and
bfloat16 with as many as suit it best on the machine, of 512, 1,024 and 4,096.
Whole files include all that happens between a FASTA file and the means on the disk, and making the encoder ready;
transformers' weights come from a folder in their own arithmetic, and its means go into one file.

The limits are matrix products of the encoder's own shapes: the best of torch's and oneDNN's. Useful operations are
those of the encoder on tokens, without padding. "Products alone" are the linear maps and attentions of proteins of the
greatest length, with each thread on its own and nothing between them: what inference could reach with these.
Cosines are those of means to the float32 ones, the worst protein's, and again after the mean of all proteins was
subtracted.

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
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fedbio.encoder import embed_file
from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.estimate import operations
from fedbio.encoder.linear import make_linear
from fedbio.encoder.network import attend
from fedbio.encoder.packs import ENDS
from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.proteins import read
from fedbio.proteins.demo import generate
from fedbio.weights import ESM1NV, EncoderConfig

Work = Callable[[], object]

ROWS = {"cpu": (512, 2048), "cuda": (65_536,)}
PEER_TOKENS = (512, 1024, 4096)
"""Of a padded batch; fair-esm takes the last."""
READY_SECONDS = 3.0


def seconds(work: Work, device: torch.device) -> float:
    """Return how long a piece of work takes, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


class Ours:
    """One arithmetic of fedbio: inference over sequences at hand, and over a file."""

    def __init__(self, dtype: str, args: argparse.Namespace, fasta: Path, sequences: list[bytes]) -> None:
        begun = time.perf_counter()
        self.choice = EncoderChoice(
            encoder=ESM1NV.name, device=args.device, dtype=dtype, threads=args.threads, long="cut"
        )
        self.setup = Setup(self.choice)
        self.inference = self.setup.inference()
        self.ready_seconds = time.perf_counter() - begun
        self.plan = self.setup.plan(sequences)
        self.fasta, self.sequences = fasta, sequences

    def infer(self) -> NDArray[np.float32]:
        """Return the means in the order of the proteins, shape (proteins, D)."""
        sums = np.concatenate(
            list(self.inference.packs(self.sequences, self.plan, range(len(self.plan.packs) - 1)))
        )  # (pieces, D), a piece for each protein
        means = np.empty_like(sums)
        means[self.plan.protein] = sums / (self.plan.end - self.plan.begin)[:, None]
        return means

    def embed(self) -> None:
        """Embed the file into another."""
        with tempfile.TemporaryDirectory() as folder:
            embed_file(
                self.fasta,
                Path(folder) / "means.h5",
                encoder=self.choice.encoder,
                device=self.choice.device,
                dtype=self.choice.dtype,
                threads=self.choice.threads,
                long="cut",
            )


def sorted_batches(sequences: list[bytes], most: int) -> list[list[int]]:
    """Numbers of proteins by batch: longest last, and at most so many tokens with padding, or one protein."""
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(sequences)), key=lambda number: len(sequences[number])):
        if batches[-1] and (len(sequences[number]) + ENDS) * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(number)
    return batches


class FairEsm:
    """fair-esm's BERT of the same size; a file as its extract script does it, one output file for each protein."""

    def __init__(self, config: EncoderConfig, device: torch.device, fasta: Path) -> None:
        self.config, self.device, self.fasta = config, device, fasta
        self.model, self.alphabet = self.load()

    def load(self) -> tuple[Any, Any]:
        """Make the model ready."""
        import esm

        options = argparse.Namespace(
            arch="roberta_large",
            layers=self.config.layers,
            embed_dim=self.config.width,
            ffn_embed_dim=self.config.ffn,
            attention_heads=self.config.heads,
            max_positions=self.config.max_tokens,
            token_dropout=True,
        )
        alphabet = esm.Alphabet.from_architecture("ESM-1b")
        return esm.ProteinBertModel(options, alphabet).eval().to(self.device), alphabet

    def means(self, model: Any, alphabet: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each protein's name and mean."""
        import esm

        convert = alphabet.get_batch_converter(self.config.max_residues)
        data = esm.FastaBatchedDataset.from_file(self.fasta)
        layers = self.config.layers
        for batch in data.get_batch_indices(PEER_TOKENS[-1], extra_toks_per_seq=1):
            labels, strings, tokens = convert([data[number] for number in batch])
            hidden = model(tokens.to(self.device), repr_layers=[layers])["representations"][layers].cpu()
            for row, label, string in zip(hidden, labels, strings, strict=True):
                yield label, row[1 : 1 + min(len(string), self.config.max_residues)].mean(0).clone()

    def infer(self) -> None:
        """Compute the means and drop them."""
        for _ in self.means(self.model, self.alphabet):
            pass

    def embed(self) -> None:
        """Embed the file."""
        with tempfile.TemporaryDirectory() as folder:
            for label, mean in self.means(*self.load()):
                torch.save({"label": label, "mean_representations": {6: mean}}, Path(folder) / f"{label}.pt")


class Transformers:
    """transformers' EsmModel of the same size."""

    def __init__(
        self, config: EncoderConfig, device: torch.device, dtype: torch.dtype, fasta: Path, sequences: list[bytes]
    ) -> None:
        from transformers import EsmConfig, EsmModel

        self.device, self.dtype, self.fasta, self.sequences = device, dtype, fasta, sequences
        options = EsmConfig(
            vocab_size=33,
            mask_token_id=32,
            pad_token_id=1,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.ffn,
            max_position_embeddings=config.max_tokens,
            position_embedding_type="rotary",
            token_dropout=True,
        )
        self.folder = fasta.parent / f"transformers-{str(dtype).removeprefix('torch.')}"
        EsmModel(options, add_pooling_layer=False).to(dtype).save_pretrained(self.folder)
        self.model = self.load()
        some = sequences[:24]
        self.tokens = PEER_TOKENS[0]
        self.means(self.model, some)
        taken = {}
        for self.tokens in PEER_TOKENS:
            taken[self.tokens] = min(seconds(lambda: self.means(self.model, some), device) for _ in range(2))
        self.tokens = min(taken, key=taken.__getitem__)
        print(f"transformers {dtype} in batches of {self.tokens} tokens", file=sys.stderr)

    def load(self) -> Any:
        """Make the model ready."""
        from transformers import EsmModel

        model = EsmModel.from_pretrained(self.folder, add_pooling_layer=False, dtype=self.dtype)
        return model.eval().to(self.device)

    def means(self, model: Any, sequences: list[bytes]) -> list[torch.Tensor]:
        """Return the means, in the order of batches."""
        alphabet, means = ALPHABETS["esm"], []
        for batch in sorted_batches(sequences, self.tokens):
            lengths = [len(sequences[number]) for number in batch]
            tokens = torch.ones(len(batch), max(lengths) + ENDS, dtype=torch.int64)
            for row, number in zip(tokens, batch, strict=True):
                length = len(sequences[number])
                row[0], row[length + 1] = alphabet.start, alphabet.end
                row[1 : length + 1] = torch.from_numpy(alphabet.encode(sequences[number]).astype(np.int64))
            mask = (tokens != 1).to(self.device)
            hidden = model(input_ids=tokens.to(self.device), attention_mask=mask).last_hidden_state
            means += [row[1 : length + 1].float().mean(0).cpu() for row, length in zip(hidden, lengths, strict=True)]
        return means

    def infer(self) -> None:
        """Compute the means and drop them."""
        self.means(self.model, self.sequences)

    def embed(self) -> None:
        """Embed the file."""
        sequences = [protein.sequence.encode() for protein in read(self.fasta)]
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "means.npy", torch.stack(self.means(self.load(), sequences)).numpy())


class Alone:
    """The linear maps and attentions of the encoder on a CPU without what stands between them."""

    PROTEINS = 8

    def __init__(self, config: EncoderConfig, dtype: torch.dtype, threads: int) -> None:
        tokens, width = config.max_tokens, config.width
        shapes = [(3 * width, width), (width, width), (config.ffn, width), (width, config.ffn)]
        self.maps = [
            make_linear(
                torch.randn(outputs, inputs),
                torch.randn(outputs),
                dtype=dtype,
                activation=config.activation if outputs == config.ffn else None,
            )
            for outputs, inputs in shapes * config.layers
        ]
        self.stream, self.wide = torch.randn(tokens, width).to(dtype), torch.randn(tokens, config.ffn).to(dtype)
        self.qkv = torch.randn(tokens, 3 * width).to(dtype).view(1, tokens, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        self.todo = self.PROTEINS * threads * float(operations(config, np.array([float(tokens)]))[0])
        self.threads, self.best = threads, 0.0

    def lane(self) -> None:
        """Compute the share of one thread."""
        torch.set_num_threads(1)
        with torch.inference_mode():
            for _ in range(self.PROTEINS):
                for number, linear in enumerate(self.maps):
                    linear(self.wide if number % 4 == 3 else self.stream)
                    if number % 4 == 0:
                        attend(*self.qkv.unbind())

    def run(self) -> None:
        """Compute that of all threads."""
        with ThreadPoolExecutor(self.threads) as lanes:
            for lane in [lanes.submit(self.lane) for _ in range(self.threads)]:
                lane.result()
        torch.set_num_threads(self.threads)  # that of threads to come, which the last one has set

    def measure(self) -> None:
        """Run once."""
        self.best = max(self.best, self.todo / seconds(self.run, torch.device("cpu")))


class Products:
    """Matrix products of the encoder's shapes in one arithmetic; `best` is in operations per second."""

    def __init__(self, config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.best = device, 0.0
        self.works: list[tuple[Work, float]] = []
        shapes = [(config.width, 3 * config.width), (config.width, config.ffn), (config.ffn, config.width)]
        for rows in ROWS[device.type]:
            for inputs, outputs in shapes:
                x = torch.randn(rows, inputs, device=device, dtype=dtype)
                weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
                todo = 10 * 2.0 * rows * inputs * outputs
                self.works.append((lambda x=x, weight=weight: [F.linear(x, weight) for _ in range(10)], todo))
                if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                    multiply = torch.ops.mkldnn._linear_pointwise
                    self.works.append(
                        (
                            lambda x=x, packed=packed, multiply=multiply: [
                                multiply(x, packed, None, "none", [], "") for _ in range(10)
                            ],
                            todo,
                        )
                    )

    def measure(self) -> None:
        """Run all once."""
        for work, todo in self.works:
            self.best = max(self.best, todo / seconds(work, self.device))


def cosines(found: NDArray[np.float32], exact: NDArray[np.float32]) -> tuple[float, float]:
    """The least cosine of corresponding rows, as they are and after the mean row of `exact` was subtracted."""

    def least(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())

    a, b = found.astype(np.float64), exact.astype(np.float64)
    return least(a, b), least(a - b.mean(0), b - b.mean(0))


def result(name: str, value: float, limit: float, unit: str, goal: float | None) -> dict[str, Any]:
    """One line of the results: a value, what it is compared with, and whether their ratio reaches the goal."""
    ratio = value / limit
    line = {"name": name, "value": float(f"{value:.7g}"), "unit": unit, "limit": float(f"{limit:.7g}")}
    return line | {"ratio": float(f"{ratio:.7g}"), "goal": goal, "met": goal is None or ratio >= goal}


GOALS = {
    "cpu": {
        ("bfloat16", "file", "share"): 0.65,
        ("float32", "file", "share"): 0.72,
        ("bfloat16", "file", "fair-esm"): 5.9,
        ("float32", "file", "fair-esm"): 3.0,
        ("bfloat16", "file", "transformers bfloat16"): 2.6,
    },
    "cuda": {("bfloat16", "inference", "share"): 0.5},
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=Path, help="file of proteins to embed (default: demo proteins)")
    parser.add_argument("--count", type=int, default=100, help="how many of them, drawn by chance (default: 100)")
    parser.add_argument("--turns", type=int, default=3, help="how often all is measured (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that are allowed)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16", "int8"], help="(default: float32 bfloat16 int8)"
    )
    parser.add_argument("--without-peers", action="store_true", help="leave out fair-esm and transformers")
    args = parser.parse_args()
    proteins = [each.sequence for each in (read(args.proteins) if args.proteins else generate(args.count, seed=1))]
    chosen = np.random.default_rng(1).permutation(len(proteins))[: args.count]
    sequences = [proteins[number][: ESM1NV.max_residues].encode() for number in chosen]

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        fasta = Path(folder) / "proteins.fasta"
        fasta.write_text("".join(f">p{number}\n{each.decode()}\n" for number, each in enumerate(sequences)))
        line = measure(args, fasta, sequences)
    print(json.dumps(line))
    return 0 if all(each["met"] for each in line["results"]) else 1


def measure(args: argparse.Namespace, fasta: Path, sequences: list[bytes]) -> dict[str, Any]:
    """Measure all in turns; returns the line of results."""
    device = Setup(EncoderChoice(encoder=ESM1NV.name, device=args.device)).device
    dtypes = [dtype for dtype in args.dtypes if dtype != "int8" or device.type == "cpu"]
    ours = {dtype: Ours(dtype, args, fasta, sequences) for dtype in dtypes}
    products = {
        dtype: Products(ESM1NV, device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16") if dtype in dtypes
    }
    alone = {
        dtype: Alone(ESM1NV, getattr(torch, dtype), args.threads or len(os.sched_getaffinity(0)))
        for dtype in products
        if device.type == "cpu"
    }
    works: dict[tuple[str, ...], Work] = {}
    for dtype, mine in ours.items():
        works[dtype, "inference"], works[dtype, "file"] = mine.infer, mine.embed
    if not args.without_peers and importlib.util.find_spec("esm"):
        fair = FairEsm(ESM1NV, device, fasta)
        works["fair-esm", "inference"], works["fair-esm", "file"] = fair.infer, fair.embed
    if not args.without_peers and importlib.util.find_spec("transformers"):
        for kind in (torch.float32, torch.bfloat16):
            name = f"transformers {str(kind).removeprefix('torch.')}"
            peer = Transformers(ESM1NV, device, kind, fasta, sequences)
            works[name, "inference"], works[name, "file"] = peer.infer, peer.embed
    best = dict.fromkeys(works, float("inf"))
    for turn in range(args.turns + 1):  # the first warms up
        for limit in (*products.values(), *alone.values()):
            limit.measure()
        for name, work in works.items():
            taken = seconds(work, device)
            best[name] = min(best[name], taken) if turn else best[name]
            print(f"turn {turn} {' '.join(name)} {taken:.2f} s", file=sys.stderr, flush=True)

    tokens = np.array([len(each) + ENDS for each in sequences], dtype=float)
    results = [
        result(f"{dtype} products alone against the matrix product", limit.best / 1e9, peak / 1e9, "GFLOP/s", None)
        for dtype, limit in alone.items()
        if (peak := products[dtype].best)
    ]
    results += compare(device, ours, best, products, float(operations(ESM1NV, tokens).sum()), sum(map(len, sequences)))
    return {"benchmark": "embed", "machine": machine(device, sequences), "results": results}


def compare(
    device: torch.device,
    ours: dict[str, Ours],
    best: dict[tuple[str, ...], float],
    products: dict[str, Products],
    useful: float,
    residues: int,
) -> list[dict[str, Any]]:
    """Return the lines of results from the best times."""
    goals, lines = GOALS[device.type], []
    for dtype, mine in ours.items():
        limit = products.get(dtype) or products.get("bfloat16")
        if limit:
            which = dtype if dtype in products else "bfloat16"
            for kind in ("inference", "file"):
                value = useful / best[dtype, kind] / 1e9
                goal = goals.get((dtype, kind, "share"))
                name = f"{dtype} {kind} against the {which} matrix product"
                lines.append(result(name, value, limit.best / 1e9, "GFLOP/s", goal))
        for peer, kind in [key for key in best if key[0] not in ours]:
            value, other = residues / best[dtype, kind], residues / best[peer, kind]
            goal = goals.get((dtype, kind, peer))
            lines.append(result(f"{dtype} {kind} against {peer}", value, other, "residues/s", goal))
        ready = result(f"{dtype} ready", mine.ready_seconds, READY_SECONDS, "s", None)
        lines.append(ready | {"goal": 1.0, "met": ready["ratio"] <= 1})
    if "float32" in ours:
        exact = ours["float32"].infer()
        for dtype in ours:
            if dtype != "float32":
                plain, centred = cosines(ours[dtype].infer(), exact)
                strict = dtype == "bfloat16"
                lines.append(result(f"{dtype} cosine to float32", plain, 1, "", 0.99998 if strict else None))
                lines.append(result(f"{dtype} centred cosine", centred, 1, "", 0.999 if strict else None))
    return lines


def machine(device: torch.device, sequences: list[bytes]) -> dict[str, Any]:
    """What was measured on, and over what."""
    cuda = device.type == "cuda"
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name() if cuda else torch.cpu.get_capabilities()["cpu_name"],
        "vectors": [
            name for name, able in torch.cpu.get_capabilities().items() if able is True and name[:3] in ("avx", "amx")
        ],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "proteins": len(sequences),
        "residues": sum(map(len, sequences)),
    }


if __name__ == "__main__":
    sys.exit(main())
