"""``fedbio embed``: proteins in, an embeddings file out."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from fedbio.compartments import named_classes
from fedbio.encoder_names import DEFAULT_ENCODER
from fedbio.errors import SettingsError

EXAMPLE = "fedbio embed proteins.fasta -o proteins.h5 --encoder esm2_t6_8M_UR50D.pt"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, metavar="FILE", help="proteins: FASTA, CSV or TSV, plain or .gz")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="EMB.h5", help="embeddings file to make")
    parser.add_argument(
        "--encoder", default=DEFAULT_ENCODER, help="name (see fedbio encoder list), checkpoint file or folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights of an untrained encoder")
    parser.add_argument("--sha256", metavar="DIGEST", help="digest that the weights must have")
    parser.add_argument(
        "--pooling",
        choices=["mean", "ends", "max", "start", "residues"],
        default="mean",
        help="average over residues, the same beside averages at both ends, their maximum, the start token, or one row "
        "per residue (large)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="layer whose output is taken, 0 for the input of the first (default: last)",
    )
    parser.add_argument(
        "--long",
        choices=["window", "cut"],
        default="window",
        help="proteins longer than the encoder takes: pool over overlapping windows, or use their beginning",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "int8"],
        default="auto",
        help="arithmetic; auto takes bfloat16 where the hardware has it",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:NUMBER, or several like cuda:0,cuda:1, a process each"
    )
    parser.add_argument("--batch-residues", type=int, metavar="N", help="the most tokens in a pack")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all that are allowed)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="the most memory of this process, like 2G or 800M (default: as it comes)"
    )
    parser.add_argument("--reuse", type=Path, metavar="EMB.h5", help="take rows of the same encoder from this file")
    parser.add_argument("--classes", metavar="A,B", help="the labels that are known (default: the ten compartments)")
    parser.add_argument("--labels", type=Path, metavar="CSV", help="table of labels beside the proteins")
    parser.add_argument("--skip-invalid", action="store_true", help="leave wrong records out instead of stopping")
    parser.add_argument(
        "--dry-run", action="store_true", help="only estimate time, memory and disk, by a short measurement"
    )
    parser.add_argument("--wait", action="store_true", help="wait for another process that works on EMB.h5")
    parser.add_argument("--label", default="embedding", help="what the progress line says")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Embed, or estimate what embedding takes, and say what was done."""
    for name, least in (("threads", 1), ("batch_residues", 1), ("seed", 0), ("layer", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: expected a number of at least {least}")
    if args.dry_run:
        return _estimate(args)
    from fedbio.encoder.embed import embed_file

    report = embed_file(
        args.source,
        args.output,
        reuse=args.reuse,
        label=args.label,
        wait=args.wait,
        skip_invalid=args.skip_invalid,
        labels=args.labels,
        classes=named_classes(args.classes),
        **_choice(args),
    )
    if not args.json:
        print(f"{args.output}: {report.proteins:,} proteins, {report.residues:,} residues in {report.seconds:.1f} s")
    return {**asdict(report), "encoder": msgspec.structs.asdict(report.encoder), "output": str(args.output)}


def _estimate(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.encoder.estimate import estimate_file
    from fedbio.encoder.setup import EncoderChoice

    estimate = estimate_file(
        args.source,
        EncoderChoice(**_choice(args)),
        folder=args.output.parent,
        labels=args.labels,
        classes=named_classes(args.classes),
        skip_invalid=args.skip_invalid,
    )
    if not args.json:
        encoder = estimate.encoder
        longer = f"{estimate.longer:,} proteins longer than {encoder.max_residues} residues"
        what = {"cut": "are cut", "window": f"are covered by windows, {estimate.pieces:,} pieces in all"}[encoder.long]
        print(
            f"{args.source}: {estimate.proteins:,} proteins, {estimate.residues:,} residues; {longer} {what}\n"
            f"about {estimate.seconds:,.0f} s on {estimate.device} ({estimate.residues_per_second:,.0f} residues/s), "
            f"{estimate.memory_bytes / 2**30:.1f} GiB of memory, {estimate.disk_bytes / 2**20:,.0f} MiB of disk, "
            f"of which {estimate.file_bytes / 2**20:,.0f} MiB stay ({encoder.pooling} of layer {encoder.layer})"
        )
    return {**asdict(estimate), "encoder": msgspec.structs.asdict(estimate.encoder)}


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    """Which encoder and how it shall compute, as both `embed_file` and `EncoderChoice` name it."""
    from fedbio.encoder.memory import read_size

    names = ("encoder", "seed", "dtype", "device", "long", "pooling", "layer", "batch_residues", "threads")
    memory = read_size(args.memory) if args.memory else None
    return {"expected_sha256": args.sha256, "memory": memory, **{name: getattr(args, name) for name in names}}
