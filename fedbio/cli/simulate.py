"""``fedbio simulate``: all parties on this machine."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbio.errors import SettingsError
from fedbio.files import write_whole
from fedbio.settings import JobsFile, RunSettings, SitesSettings, TaskKind, check, load
from fedbio.settings_files import read_settings, with_overrides

if TYPE_CHECKING:
    from fedbio.federation.simulation import Simulation

EXAMPLE = """
fedbio simulate config/config.yaml -o results/demo --set training.rounds=10
  fedbio simulate jobs.yaml --sites 100 --data sites/ -o results/many
"""

DEALT_FILE = "dealt.json"
"""Beside the sites' files: the settings by which they were made."""

DEMO_PROTEINS, DEMO_LEAST = 100, 20
"""Synthetic proteins of a site that was given none, and of one among very many."""
DEMO_TEST, DEMO_TEST_LEAST = 300, 60
"""The same of those that are for testing, and so at every site."""
DEMO_ALL = 30_000
"""So many at all sites together, of either kind, make them fewer at each."""

DATA_FILES = (".fasta", ".csv", ".tsv")
"""Endings of sites' files of proteins, the first that is there is taken."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="settings of the run, such as config/config.yaml, or a job file"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put a value over the settings")
    parser.add_argument("--sites", type=int, metavar="N", help="number of sites (default: as set)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with one NAME.fasta per site (default: RUN/data; a job file's sites get synthetic ones)",
    )
    parser.add_argument(
        "--pool",
        type=int,
        metavar="N",
        help="play the sites in N processes; 0: each in one of its own (default: 0 up to 8 sites, else all processors)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all parties to their end."""
    from fedbio.federation.simulation import simulate

    for name, value, least in (("--pool", args.pool, 0), ("--sites", args.sites, 1)):
        if value is not None and value < least:
            raise SettingsError(f"{name} {value}: expected a number of at least {least}")
    is_job_file = "jobs" in read_settings(args.config)
    what = _of_job_file(args) if is_job_file else _of_settings(args)
    simulate(what, args.output, processes=args.pool)
    model = args.output / "global"
    if not args.json:
        where = "the model in global/" if model.exists() else "the models in server/models/"
        print(f"done; every party's folder and {where} are in {args.output}")
    return {"output": str(args.output), **({"model": str(model)} if model.exists() else {})}


def _of_settings(args: argparse.Namespace) -> Simulation:
    """Return what the settings of a run say, its data dealt out."""
    from fedbio.federation.simulation import Simulation, check_sites

    overrides = [*args.set, *([f"sites.count={args.sites}"] if args.sites else [])]
    settings = load(args.config, RunSettings, overrides)
    data = args.data or args.output / "data"
    if args.data is None:
        check_sites(args.output, settings.sites.names)
        _deal_out(settings, args.output, data)
    return Simulation(
        jobs=settings.jobs(),
        sites={name: data / f"{name}.fasta" for name in settings.sites.names},
        allow=("map",) if settings.report.map else (),
        driver=settings.driver,
        device=settings.device,
        embeddings=settings.embeddings,
        synthetic=settings.dataset == "demo",
        save_model=_save_model,
    )


def _of_job_file(args: argparse.Namespace) -> Simulation:
    """Return what a job file says; its sites are those of `--sites`, its own, or those whose data are there."""
    from fedbio.federation.job_files import check_job_files
    from fedbio.federation.simulation import Simulation, check_sites

    content = with_overrides(read_settings(args.config), args.set, args.config)
    jobs = check(content, JobsFile, args.config)
    names = [f"site-{number}" for number in range(1, args.sites + 1)] if args.sites else jobs.sites
    data = args.data or args.output / "data"
    if args.data is None:
        names = names or SitesSettings().names
        check_sites(args.output, names)
        _deal_out_demo(names, args.output, data)
    there = {path.stem: path for suffix in reversed(DATA_FILES) for path in data.glob(f"*{suffix}")}
    names = names or sorted(there)
    if not names:
        raise SettingsError(f"{data}: no site's file is there; `fedbio data split FILE -o {data}` makes them")
    return Simulation(
        jobs=check({**content, "sites": names}, JobsFile, args.config),
        sites={name: there.get(name, data / f"{name}.fasta") for name in names},
        files=check_job_files(jobs.jobs, args.config.parent, args.config),
        # whoever plays all parties is the operator of each
        allow=typing.get_args(TaskKind),
        save_model=_save_model,
    )


def _save_model(workspace: Path, params: Any, publication: Any) -> None:
    # imported here: until a model is published nothing of it is needed
    from fedbio.executors.publish import save_global

    save_global(workspace, params, publication)


def _deal_out(settings: RunSettings, output: Path, data: Path) -> None:
    """Deal the data set's proteins out to sites, unless that was done so already: what the Snakefile's rules do."""
    from fedbio.federation.simulation import check_dealt

    sites, demo = settings.sites, settings.demo
    said = {"dataset", "demo", "sites", "classes", "max_proteins", "labels"}
    how = settings.model_dump_json(include=said, indent=2).encode()
    note = data / DEALT_FILE
    there = all((data / f"{name}.fasta").is_file() for name in sites.names)
    # without a note it was someone else who has put them there
    if there and (not note.is_file() or note.read_bytes() == how):
        return
    if there:
        check_dealt(output)
    proteins: str | Path = output / "proteins.fasta"
    if settings.dataset == "demo":
        _data("demo", output=proteins, count=demo.proteins, seed=demo.seed, difficulty=demo.difficulty)
    elif Path(settings.dataset).is_file():
        proteins = settings.dataset
    else:
        proteins = _data("fetch", settings.dataset)["path"]
    _data(
        "split", proteins, output=data, names=",".join(sites.names), by=sites.by, alpha=sites.alpha, seed=sites.seed,
        classes=",".join(settings.classes), limit=settings.max_proteins, labels=settings.labels,
    )  # fmt: skip
    write_whole(note, how)


def _deal_out_demo(names: list[str], output: Path, data: Path) -> None:
    """Deal synthetic proteins out to sites that were given none: a script may have data of its own."""
    if all((data / f"{name}.fasta").is_file() for name in names):
        return
    proteins, count, test = output / "proteins.fasta", *_demo_size(len(names))
    _data("demo", output=proteins, count=count, **{"test-fraction": test / count})
    _data("split", proteins, output=data, names=",".join(names), by="iid")


def _demo_size(sites: int) -> tuple[int, int]:
    """Return how many synthetic proteins there are, and how many of them for testing: a thousand sites take minutes."""
    count = min(DEMO_PROTEINS, max(DEMO_LEAST, DEMO_ALL // sites)) * sites
    return count, min(count // 5, DEMO_TEST, max(DEMO_TEST_LEAST, DEMO_ALL // sites))


def _data(verb: str, *inputs: object, **options: object) -> dict[str, Any]:
    """Do what ``fedbio data`` does with these arguments; an option that is None is left out."""
    from fedbio.cli import data as command

    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    parser = argparse.ArgumentParser()
    command.configure(parser)
    args = parser.parse_args([verb, *map(str, inputs), *given])
    return command.run(argparse.Namespace(**vars(args), json=True))
