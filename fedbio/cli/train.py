"""``fedbio train``: labelled proteins and their embeddings in, a classifier and its measures out."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import Any

import msgspec

from fedbio.errors import SettingsError
from fedbio.settings import ClassifyJob, JobsFile, RunSettings, TrainingSettings, check
from fedbio.settings_files import read_yaml, with_overrides

EXAMPLE = "fedbio train site.fasta --embeddings site.h5 -o results/alone --mlp 32 --mlp 256-128-64 --seeds 0 1 2"

_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--mlp": ("mlps", {"action": "append", "metavar": "WIDTHS"}),
    "--seeds": ("seeds", {"nargs": "+", "metavar": "SEED"}),
    "--rounds": ("rounds", {"metavar": "N"}),
    "--epochs": ("epochs", {"metavar": "N"}),
    "--batch-size": ("batch_size", {"metavar": "PROTEINS"}),
    "--learning-rate": ("learning_rate", {"metavar": "RATE"}),
    "--weight-decay": ("weight_decay", {"metavar": "RATE"}),
    "--dropout": ("dropout", {"metavar": "SHARE"}),
    "--patience": ("patience", {"metavar": "ROUNDS"}),
    "--validation-fraction": ("validation_fraction", {"metavar": "SHARE"}),
}
"""Options that stand for keys of the settings' training section; they come before what the file says."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="FILE", help="labelled proteins: FASTA, CSV or TSV")
    parser.add_argument(
        "--embeddings",
        nargs="+",
        type=Path,
        required=True,
        metavar="EMB.h5",
        help="one embeddings file for each FILE, in their order",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--party", default="central", metavar="NAME", help="whose models these are, in the results")
    parser.add_argument(
        "--settings", type=Path, metavar="YAML", help="settings file with a training section (and classes)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put a value over the settings")
    for option, (key, details) in _OPTIONS.items():
        field = TrainingSettings.model_fields[key]
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        meaning = str(field.description).rstrip(".")
        parser.add_argument(
            option,
            dest=key,
            default=argparse.SUPPRESS,
            help=f"{meaning[0].lower()}{meaning[1:]} (default: {shown})",
            **details,
        )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="classifiers to train at once, one thread each; as many as there are cores if not given",
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="table of labels beside the proteins")
    parser.add_argument("--skip-invalid", action="store_true", help="leave wrong records out instead of stopping")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and say what was learnt."""
    if len(args.sources) != len(args.embeddings):
        raise SettingsError(
            f"--embeddings: {len(args.embeddings)} files for {len(args.sources)} files of proteins; give one for each"
        )
    settings, synthetic = _settings(args)

    from fedbio.classifier.data import load_site_data, merge_sites
    from fedbio.classifier.study import run_study

    parts = [
        load_site_data(
            source,
            embeddings,
            settings.classes,
            validation_fraction=settings.training.validation_fraction,
            labels=args.labels,
            skip_invalid=args.skip_invalid,
            attention_residues=settings.training.attention_residues,
        )
        for source, embeddings in zip(args.sources, args.embeddings, strict=True)
    ]
    outcome = run_study(
        merge_sites(parts),
        settings.training,
        args.output,
        party=args.party,
        synthetic=synthetic,
        threads=args.threads,
    )
    if not args.json:
        for mlp, accuracy in outcome.accuracy.items():
            marked = "  best on validation" if mlp == outcome.best else ""
            print(f"{mlp:<20} test accuracy {accuracy:.3f}{marked}")
        print(f"{args.output}: model of {outcome.best} in {args.output / 'model'}")
    return {
        "output": str(args.output),
        "best": outcome.best,
        "accuracy": {mlp: value if value == value else None for mlp, value in outcome.accuracy.items()},
        "model": msgspec.to_builtins(outcome.card),
    }


def _settings(args: argparse.Namespace) -> tuple[ClassifyJob, bool]:
    """Return classes and training settings, and whether the settings say that the proteins are synthetic."""
    synthetic = False
    job = ClassifyJob(workflow="classify")
    if args.settings is None and args.set:
        raise SettingsError("--set: puts values over a settings file; name it with --settings")
    if args.settings is not None:
        content = with_overrides(read_yaml(args.settings), args.set, args.settings)
        if "jobs" in content:
            jobs = check(content, JobsFile, args.settings).jobs
            job = next((each for each in jobs if isinstance(each, ClassifyJob)), job)
        else:
            settings = check(content, RunSettings, args.settings)
            synthetic = settings.dataset == "demo"
            job = ClassifyJob(workflow="classify", classes=settings.classes, training=settings.training)
    given = {key: getattr(args, key) for key, _ in _OPTIONS.values() if hasattr(args, key)}
    training = check({**job.training.model_dump(), **given}, TrainingSettings, "command line")
    return job.model_copy(update={"training": training}), synthetic
