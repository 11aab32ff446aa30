"""``fedbio simulate``: all parties on this machine."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import Any

from fedbio.settings import RunSettings, load

EXAMPLE = "fedbio simulate config/config.yaml -o results/demo --set training.rounds=10"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="settings of the run, such as config/config.yaml")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put a value over the settings")
    parser.add_argument("--sites", type=int, metavar="N", help="number of sites (default: as set)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with one NAME.fasta per site (default: RUN/data)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all parties to their end."""
    from fedbio.federation.simulation import simulate

    overrides = [*args.set, *([f"sites.count={args.sites}"] if args.sites else [])]
    settings = load(args.config, RunSettings, overrides)
    data = args.data or args.output / "data"
    if args.data is None:
        _deal_out(settings, args.output, data)
    simulate(settings, args.output, data)
    if not args.json:
        print(f"done; every party's folder and the model in global/ are in {args.output}")
    return {"output": str(args.output), "model": str(args.output / "global")}


def _deal_out(settings: RunSettings, output: Path, data: Path) -> None:
    """Deal the data set's proteins out to sites, unless that was done already."""
    if all((data / f"{name}.fasta").is_file() for name in settings.sites.names):
        return
    proteins = str(output / "proteins.fasta")
    if settings.dataset == "demo":
        _data(
            "demo",
            "-o",
            proteins,
            "--count",
            settings.demo.proteins,
            "--seed",
            settings.demo.seed,
            "--difficulty",
            settings.demo.difficulty,
        )
    elif Path(settings.dataset).is_file():
        proteins = settings.dataset
    else:
        proteins = _data("fetch", settings.dataset)["path"]
    sites = settings.sites
    limit = ["--limit", settings.max_proteins] if settings.max_proteins else []
    labels = ["--labels", settings.labels] if settings.labels else []
    _data(
        "split", proteins, "-o", data, "--names", ",".join(sites.names), "--by", sites.by, "--alpha", sites.alpha,
        "--seed", sites.seed, "--classes", ",".join(settings.classes), *limit, *labels,
    )  # fmt: skip


def _data(*arguments: object) -> dict[str, Any]:
    """Do what ``fedbio data`` does with these arguments."""
    from fedbio.cli import data as command

    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(argparse.Namespace(**vars(parser.parse_args([*map(str, arguments)])), json=True))
