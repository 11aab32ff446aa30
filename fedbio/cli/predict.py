"""``fedbio predict``: new proteins and a model in, their locations out."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from fedbio.errors import DataError, RefusedError, SettingsError
from fedbio.results import EncoderInfo

EXAMPLE = "fedbio predict new.fasta --model results/demo/global -o new.csv"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, metavar="FILE", help="proteins: FASTA, CSV or TSV, plain or .gz")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder with a trained classifier")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CSV", help="table to write")
    parser.add_argument(
        "--encoder",
        metavar="ENCODER",
        help="folder, file or name of the model's encoder; not needed if built in or, by its name, in the cache",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights of an untrained encoder")
    parser.add_argument(
        "--embeddings", type=Path, metavar="EMB.h5", help="take embeddings from here; made if it is not there"
    )
    parser.add_argument(
        "--dtype",
        choices=["model", "auto", "float32", "bfloat16", "int8"],
        default="model",
        help="arithmetic of the encoder",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all that are allowed)")
    parser.add_argument("--skip-invalid", action="store_true", help="leave wrong records out instead of stopping")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Embed where that is needed, predict, and say how many predictions are unsure."""
    from fedbio.classifier.model_files import load_model
    from fedbio.classifier.predictions import predict_file
    from fedbio.classifier.unsure import meaning

    if args.output.resolve() == args.source.resolve():
        raise SettingsError(f"-o {args.output}: this is the file of proteins; name another file for the predictions")
    model = load_model(args.model)
    trained_with = model.card.encoder
    with tempfile.TemporaryDirectory(prefix="fedbio-") as temporary:
        embeddings = args.embeddings or Path(temporary) / "embeddings.h5"
        if not embeddings.exists():
            _embed(args, embeddings, trained_with)
        report = predict_file(model, args.source, embeddings, args.output, skip_invalid=args.skip_invalid)
    if not args.json:
        print(
            f"{args.output}: {report.proteins:,} proteins, {report.unsure:,} of them unsure "
            f"({meaning(model.card.unsure_below)})"
        )
        if not trained_with.trained:
            print(f"The encoder {trained_with.name} is untrained: its weights are random numbers from a seed.")
    return {**asdict(report), "output": str(args.output), "model": msgspec.to_builtins(model.card)}


def _embed(args: argparse.Namespace, output: Path, trained_with: EncoderInfo) -> None:
    """Embed the proteins with the model's encoder; another one is refused before any work."""
    from fedbio.encoder import BUILT_IN, embed_file
    from fedbio.encoder.bins import bins_name
    from fedbio.encoder_names import named_path

    known = trained_with.name in BUILT_IN or named_path(trained_with.name) is not None
    if args.encoder is None and not known:
        raise DataError(
            f"{args.model}: trained with the encoder {trained_with.name!r} of SHA-256 {trained_with.weights_sha256}; "
            "give its folder or file with --encoder"
        )
    if trained_with.bins not in ("", bins_name()):
        raise DataError(
            f"{args.model}: trained on averages over other bins ({trained_with.bins}) than this release makes "
            f"({bins_name()}); train again, or predict with the release that trained it"
        )
    encoder = args.encoder or trained_with.name
    try:
        embed_file(
            args.source,
            output,
            encoder=encoder,
            seed=args.seed,
            expected_sha256=trained_with.weights_sha256,
            dtype=trained_with.dtype if args.dtype == "model" else args.dtype,
            device=args.device,
            long=trained_with.long,
            pooling=trained_with.pooling,
            layer=trained_with.layer,
            threads=args.threads,
            skip_invalid=args.skip_invalid,
        )
    except RefusedError as error:
        raise DataError(
            f"{error}, since {args.model} was trained with {trained_with.name!r} of that SHA-256; "
            "give that encoder with --encoder"
        ) from error
