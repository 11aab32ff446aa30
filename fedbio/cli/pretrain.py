"""``fedbio pretrain``: proteins in, a trained encoder out."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fedbio.errors import SettingsError
from fedbio.weights import EncoderConfig

if TYPE_CHECKING:
    from fedbio.encoder.pretraining.corpus import Corpus
    from fedbio.encoder.pretraining.recipe import Recipe
    from fedbio.encoder.pretraining.run import Start

EXAMPLE = "fedbio pretrain proteins.fasta.gz -o my-encoder --preset esm1nv-mini --exclude test.fasta --minutes 100"

_ARCHITECTURE: dict[str, tuple[type, str]] = {
    "name": (str, "what reports and embeddings files call the encoder"),
    "layers": (int, "transformer layers"),
    "heads": (int, "attention heads"),
    "width": (int, "embedding width"),
    "ffn": (int, "width of the feed-forward network"),
    "max_tokens": (int, "longest input with start and end token"),
    "activation": (str, "gelu_tanh or gelu"),
}

_RECIPE: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "highest learning rate"),
    "final_share": (float, "share of it at which the cosine ends"),
    "warmup_steps": (int, "updates until it is reached"),
    "decay_share": (float, "last part of the schedule, over which the rate falls; before it, --steps may change"),
    "pack_tokens": (int, "most tokens that go through the network at once"),
    "packs": (int, "packs in one update, over all processes"),
    "optimizer": (str, "adamw, or muon for the matrices of the linear maps and AdamW for the rest"),
    "weight_decay": (float, "of the matrices of the linear maps"),
    "clip": (float, "longest gradient"),
    "mask_share": (float, "share of the residues that are to be predicted"),
    "average": (str, "weights that are written: none (the last), ema, or tail (their mean over the last part)"),
    "average_decay": (float, "of the exponential average"),
    "average_share": (float, "part of the schedule that the mean is taken over"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="FASTA", help="proteins to learn from, plain or .gz")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="encoder folder to make, or to go on with"
    )
    parser.add_argument("--preset", default="esm1nv-mini", help="architecture and recipe: esm1nv-44m or esm1nv-mini")
    parser.add_argument("--from", dest="start", metavar="NAME_OR_PATH", help="encoder to start from, with its shape")
    parser.add_argument("--steps", type=int, metavar="N", help="length of the schedule in updates")
    parser.add_argument("--tokens", type=_tokens, metavar="N", help="the same in tokens, for example 1e9")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so long; the same command goes on")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--valid", nargs="+", type=Path, default=[], metavar="FASTA", help="held-out proteins")
    held_out.add_argument(
        "--valid-fraction", type=float, default=0.01, metavar="SHARE", help="held out by a hash of the sequence"
    )
    parser.add_argument("--valid-every", type=int, default=500, metavar="N", help="updates between validations")
    parser.add_argument("--valid-residues", type=int, default=200_000, metavar="N", help="residues for each of them")
    parser.add_argument(
        "--exclude",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="never learn from these sequences: FASTA or CSV, or SHA-256 digests one a line",
    )
    parser.add_argument(
        "--exclude-ids", nargs="+", type=Path, default=[], metavar="FILE", help="never learn from these ids, one a line"
    )
    parser.add_argument("--skip-invalid", action="store_true", help="leave wrong records out instead of stopping")
    parser.add_argument("--seed", type=int, default=0, help="of first weights, order, windows and masks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="arithmetic")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all that are allowed)")
    parser.add_argument("--save-minutes", type=float, default=10.0, metavar="N", help="time between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, metavar="N", help="updates between lines of metrics.jsonl")
    parser.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard files")
    for title, options in (("architecture", _ARCHITECTURE), ("recipe", _RECIPE)):
        group = parser.add_argument_group(f"{title} (default: the preset's)")
        for key, (kind, meaning) in options.items():
            group.add_argument(
                f"--{key.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, metavar="VALUE", help=meaning
            )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and say how far it came."""
    from fedbio.encoder.pretraining.corpus import Inputs
    from fedbio.encoder.pretraining.optimizers import check_optimizer
    from fedbio.encoder.pretraining.recipe import PRESETS
    from fedbio.encoder.pretraining.run import Options, pretrain

    if args.preset not in PRESETS:
        raise SettingsError(f"--preset {args.preset!r}: expected one of {', '.join(PRESETS)}")
    if args.steps is not None and args.tokens is not None:
        raise SettingsError("--steps and --tokens both say how long the schedule is; give one")
    if not 0 <= args.valid_fraction < 1:
        raise SettingsError(f"--valid-fraction {args.valid_fraction}: expected a share of at least 0 and below 1")
    for name in ("steps", "tokens", "minutes", "valid_every", "valid_residues", "log_every", "threads", "save_minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    start = _start(args)
    check_optimizer(_recipe(args, start.config, None))  # what is wrong shall be said before hours of reading
    outcome = pretrain(
        args.output,
        Inputs(
            sources=args.sources,
            valid=args.valid,
            valid_fraction=args.valid_fraction,
            exclude=args.exclude,
            exclude_ids=args.exclude_ids,
            seed=args.seed,
            skip_invalid=args.skip_invalid,
        ),
        start,
        lambda corpus: _recipe(args, start.config, corpus),
        Options(
            minutes=args.minutes,
            device=args.device,
            threads=args.threads,
            save_minutes=args.save_minutes,
            valid_every=args.valid_every,
            valid_residues=args.valid_residues,
            log_every=args.log_every,
            tensorboard=not args.no_tensorboard,
        ),
    )
    if not outcome.first:
        args.json = False  # one of several processes speaks for all
    elif not args.json:
        measured = ""
        if outcome.perplexity is not None and outcome.finished:
            measured = f", final perplexity {outcome.perplexity:.2f}"
        elif outcome.perplexity is not None:
            measured = f", perplexity {outcome.perplexity:.2f} (at update {outcome.perplexity_step:,})"
        print(
            f"{outcome.output}: {outcome.step:,} of {outcome.steps:,} updates, {outcome.tokens:,} tokens{measured}"
            + ("" if outcome.finished else "; the same command goes on")
        )
    return {**asdict(outcome), "output": str(outcome.output)}


def _tokens(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number such as 150e6, found {text!r}")
    return number


def _start(args: argparse.Namespace) -> Start:
    """Which architecture, and with which weights it begins."""
    from fedbio.encoder.pretraining.recipe import PRESETS
    from fedbio.encoder.pretraining.run import Start

    given = {key: getattr(args, key) for key in _ARCHITECTURE if hasattr(args, key)}
    if args.start is None:
        return Start(_checked(msgspec.structs.asdict(PRESETS[args.preset].config) | given, EncoderConfig))
    if shape := sorted(given.keys() - {"name"}):
        raise SettingsError(f"--{shape[0].replace('_', '-')}: the encoder of --from has its own; leave it out")
    from fedbio.encoder import BUILT_IN, load_encoder_weights
    from fedbio.encoder_names import find_encoder

    path = find_encoder(args.start, built_in=BUILT_IN)
    if path is not None and args.output.exists() and args.output.samefile(path):
        raise SettingsError(
            f"-o {args.output}: this is the encoder of --from, which would be replaced; name another folder, "
            "or leave --from out to go on with the run in it"
        )
    config, weights = load_encoder_weights(args.start, seed=args.seed)
    name = given.get("name", config.name)
    return Start(msgspec.structs.replace(config, name=name), weights, Path(args.start).name)


def _recipe(args: argparse.Namespace, config: EncoderConfig, corpus: Corpus | None) -> Recipe:
    """Put the options over the preset's recipe, and, once the corpus is known, turn tokens into updates."""
    import torch

    from fedbio.encoder.inference import choose_device, choose_dtype
    from fedbio.encoder.pretraining.batches import mean_pack_tokens
    from fedbio.encoder.pretraining.recipe import PRESETS, Recipe

    values = msgspec.structs.asdict(PRESETS[args.preset].recipe)
    values |= {key: getattr(args, key) for key in _RECIPE if hasattr(args, key)}
    dtype = choose_dtype(args.dtype, choose_device(args.device))
    values |= {"seed": args.seed, "dtype": "bfloat16" if dtype == torch.bfloat16 else "float32"}
    if args.steps is not None:
        values["steps"] = args.steps
    recipe: Recipe = _checked(values, Recipe)
    if args.tokens is not None and corpus is not None:
        full = recipe.packs * mean_pack_tokens(corpus.train, config.max_residues, recipe.pack_tokens)
        recipe = msgspec.structs.replace(recipe, steps=max(1, math.ceil(args.tokens / full)))
    if not hasattr(args, "warmup_steps"):
        # a short schedule has no time for a long way up
        recipe = msgspec.structs.replace(recipe, warmup_steps=min(recipe.warmup_steps, recipe.steps // 10))
    return recipe


def _checked(values: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(f"command line: {error}") from error
