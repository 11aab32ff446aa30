"""``fedbio job``: write a job file from a template, and talk to a running server."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbio.cli.terminal import shown
from fedbio.errors import SettingsError
from fedbio.settings import JobsFile, load

if TYPE_CHECKING:
    from fedbio.federation.admin_client import AdminClient
    from fedbio.federation.admin_messages import JobInfo

EXAMPLE = """fedbio job new fedavg -o fedavg.yaml
  fedbio job submit fedavg.yaml --kit federation/admin
  fedbio job log fedavg -f --kit federation/admin"""

COLUMNS = ("name", "workflow", "state", "submitted", "started", "finished")

_TEMPLATES = "fedavg, fedopt, fedprox, scaffold, median, cyclic, evaluation, swarm, split, statistics, classify, embed"
"""Those of `fedbio.job_templates`, which takes long to load."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    new = verbs.add_parser("new", help="write a job file from a template")
    new.add_argument("template", help=_TEMPLATES)
    new.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file instead of the terminal")
    submit = _asking(verbs, "submit", "enter the jobs of a job file, with the files that they name")
    submit.add_argument("file", type=Path, help="a job file: YAML, JSON or TOML")
    submit.add_argument("--name", help="give the job this name (of a file with one job)")
    _asking(verbs, "list", "say how all jobs stand")
    for verb, help_line in (
        ("show", "say all that is known of a job"),
        ("abort", "end a job that waits or runs"),
        ("log", "print the events of a job, one JSON object a line"),
        ("download", "fetch what has come of a job: models, metrics, events"),
    ):
        _asking(verbs, verb, help_line).add_argument("name", help="the job's name")
    verbs.choices["log"].add_argument("-f", "--follow", action="store_true", help="go on until the job is over")
    verbs.choices["download"].add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a folder")


def _asking(verbs: Any, name: str, help_line: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_line)
    parser.add_argument("--kit", type=Path, required=True, metavar="DIR", help="the administrator's start-up kit")
    parser.add_argument("--server", metavar="HOST:PORT", help="the server's address, if not the kit's")
    parser.add_argument("--connect-deadline", dest="connect_deadline_s", type=float, default=10.0, metavar="SECONDS",
                        help="keep trying to reach the server for so long")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sub-verb."""
    if args.verb == "new":
        return _new(args)
    if args.verb == "submit":
        return _submit(args)
    with _client(args) as client:
        if args.verb == "list":
            jobs = client.jobs()
            if not args.json:
                _print_table(jobs)
            return {"jobs": [_as_json(job) for job in jobs]}
        if args.verb == "log":
            return _log(args, client)
        if args.verb == "download":
            files = client.download(args.name, args.output)
            if not args.json:
                print(f"{args.output}: {', '.join(str(path.relative_to(args.output)) for path in files)}")
            return {"output": str(args.output), "files": [str(path) for path in files]}
        job = client.show(args.name) if args.verb == "show" else client.abort(args.name)
        if not args.json:
            _print_job(job)
        return {"job": _as_json(job)}


def _new(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.files import write_whole
    from fedbio.job_templates import template

    text = template(args.template)
    if args.output is None:
        if not args.json:
            print(text, end="")
        return {"template": args.template, "text": text}
    if args.output.exists():
        raise SettingsError(f"{args.output}: there is a file already; choose another name, or remove it")
    write_whole(args.output, text)
    if not args.json:
        print(f"{args.output}: edit it, then fedbio job submit {args.output} --kit KIT")
    return {"template": args.template, "file": str(args.output)}


def _submit(args: argparse.Namespace) -> dict[str, Any]:
    # all of it is checked before the server is dialled
    from fedbio.federation.job_files import check_job_files

    jobs = load(args.file, JobsFile)
    if not jobs.jobs:
        raise SettingsError(f"{args.file}: jobs: there are none; name at least one job")
    if args.name:
        if len(jobs.jobs) != 1:
            raise SettingsError(f"--name {args.name}: {args.file} holds {len(jobs.jobs)} jobs; name them in the file")
        renamed = {**jobs.model_dump(exclude_unset=True), "jobs": [{**_set(jobs.jobs[0]), "name": args.name}]}
        from fedbio.settings import check

        jobs = check(renamed, JobsFile, args.file)
    check_job_files(jobs.jobs, args.file.parent, args.file)
    with _client(args) as client:
        entered = client.submit(jobs, args.file.parent, args.file)
    if not args.json:
        for job in entered:
            print(f"{job.name}: {job.state}; fedbio job log {job.name} -f --kit {args.kit} follows it")
    return {"jobs": [_as_json(job) for job in entered]}


def _set(section: Any) -> dict[str, Any]:
    found: dict[str, Any] = section.model_dump(exclude_unset=True)
    return found


def _log(args: argparse.Namespace, client: AdminClient) -> dict[str, Any]:
    count = 0
    for line in client.log(args.name, follow=args.follow):
        # whoever pipes them sees each as it comes
        print(line, flush=True)
        count += 1
    return {"job": args.name, "events": count, "state": client.show(args.name).state}


@contextmanager
def _client(args: argparse.Namespace) -> Iterator[AdminClient]:
    from fedbio.cli.server import load_kit
    from fedbio.federation.admin_client import AdminClient
    from fedbio.transport import Credentials

    kit = load_kit(args.kit, "admin")
    options = {"server": args.server, "connect_deadline_s": args.connect_deadline_s}
    with AdminClient(kit, Credentials.from_kit(args.kit), **options) as client:
        yield client


def _as_json(job: JobInfo) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(job)
    return found


def _print_table(jobs: tuple[JobInfo, ...]) -> None:
    rows = [COLUMNS, *((tuple(_shown(getattr(job, column)) for column in COLUMNS)) for job in jobs)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for job in jobs:
        if job.reason:
            print(f"{job.name}: {shown(job.reason)}")


def _print_job(job: JobInfo) -> None:
    for key in (*COLUMNS, "reason", "origin"):
        if value := getattr(job, key):
            print(f"{key}: {shown(_shown(value))}")
    for name, progress in job.runs.items():
        best = (
            "" if progress.best_value is None else f", best is round {progress.best_round} ({progress.best_value:.4f})"
        )
        print(f"run {name}: round {progress.round}{f' of {job.rounds}' if job.rounds else ''}{best}")
    if job.sites:
        print(f"sites here: {', '.join(job.sites)}")
    if job.settings:
        print(f"settings: {json.dumps(job.settings)}")


def _shown(value: Any) -> str:
    # seconds are enough for people
    text = "-" if value is None else str(value)
    return text[:19] + "Z" if text[10:11] == "T" and text.endswith("+00:00") else text
