"""``fedbio site``: the process of one institution."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import os
import time
from pathlib import Path
from typing import Any, get_args

from fedbio.errors import SettingsError
from fedbio.files import sha256_file
from fedbio.settings import SiteSettings, TaskKind, check
from fedbio.settings_files import read_yaml, with_overrides

EXAMPLE = "fedbio site --kit site-1 --data proteins.fasta -o results/site --allow map"

CHECK_S = 1.0
"""Seconds that reading the proteins may take before the server is dialled; what is not read then, its tasks read."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--settings", type=Path, metavar="YAML", help="a site's settings file, instead of --kit and --data"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put a value over the settings")
    parser.add_argument("--kit", metavar="DIR", help="the site's start-up kit")
    parser.add_argument("--data", metavar="FILE", help="the site's proteins: FASTA, CSV or TSV; they stay here")
    parser.add_argument("--labels", metavar="CSV", help="table of labels beside the proteins")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for what the site keeps"
    )
    parser.add_argument("--job", action="append", default=[], metavar="NAME", help="take part in this job only")
    parser.add_argument("--embeddings", metavar="EMB.h5", help="take vectors of the same encoder from this file")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all that are allowed)")
    parser.add_argument(
        "--allow", action="append", default=[], choices=get_args(TaskKind), help="take this kind of task too"
    )
    parser.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="FILE",
        help="let this script run here (a file, its SHA-256, or any)",
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="the server's address, if not the kit's")
    parser.add_argument("--connect-deadline", dest="connect_deadline_s", type=float, metavar="SECONDS",
                        help="keep trying to reach the server for so long")  # fmt: skip
    parser.add_argument("--synthetic", action="store_true", help="the proteins come from `fedbio data demo`")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Take part until the server's jobs are done."""
    settings = _settings(args)
    if args.server and not args.server.rpartition(":")[2].isdecimal():
        raise SettingsError(f"--server {args.server}: expected HOST:PORT, for example fed.example.org:8443")
    if args.threads:
        # read by torch and by NumPy's BLAS when they load; a workflow manager may have set them for all its jobs
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        os.environ.update(dict.fromkeys(names, str(args.threads)))
    from fedbio.cli.server import load_kit
    from fedbio.executors import load_libraries, registry
    from fedbio.federation.policy import Policy
    from fedbio.federation.site import Site
    from fedbio.transport import Credentials

    kit = load_kit(Path(settings.kit), "site")
    _look_at(settings)
    policy = Policy.read(
        args.settings.parent if args.settings else Path(),
        workflows=settings.workflows,
        max_rounds=settings.max_rounds,
        code=settings.code,
        min_count=settings.min_count,
        last_lines=settings.last_lines,
        files={Path(entry).name: sha256_file(entry) for entry in args.code if Path(entry).is_file()},
    )
    Site(
        kit=kit,
        credentials=Credentials.from_kit(settings.kit),
        workspace=args.output,
        data=Path(settings.proteins),
        labels=Path(settings.labels) if settings.labels else None,
        reuse=Path(settings.embeddings) if settings.embeddings else None,
        device=settings.device,
        threads=args.threads,
        synthetic=args.synthetic,
        executors=registry(),
        allow=settings.allow,
        jobs=args.job,
        server=args.server,
        connect_deadline_s=settings.connect_deadline_s,
        heartbeat_s=settings.heartbeat_s,
        quantization=settings.quantization,
        transport=settings.transport,
        policy=policy,
        examples=settings.examples,
        prepare=load_libraries,
        ahead=True,
    ).run()
    if not args.json:
        print(f"done; everything that this site keeps is in {args.output}")
    return {"output": str(args.output), "model": str(args.output / "global")}


def _look_at(settings: SiteSettings) -> None:
    """Read the proteins for a moment: what is wrong with them is better said now than after the server was reached."""
    from fedbio.proteins import read

    for path, of in ((settings.proteins, "proteins"), (settings.labels, "labels")):
        if path is not None and not Path(path).is_file():
            raise SettingsError(f"{path}: there is no such file of {of}; check the path")
    until = time.monotonic() + CHECK_S
    # which labels are known is the job's to say
    for _ in read(settings.proteins, labels=settings.labels, classes=None):
        if time.monotonic() > until:
            return


def _settings(args: argparse.Namespace) -> SiteSettings:
    """Return the settings of the file, or of the arguments; an argument comes before the file."""
    if args.settings is None and not (args.kit and args.data):
        raise SettingsError("fedbio site: give --kit and --data, or --settings with a site's settings file")
    source: str | Path = args.settings or "arguments"
    content = {"party": "site"} if args.settings is None else read_yaml(args.settings)
    given = {
        "kit": args.kit,
        "proteins": args.data,
        "labels": args.labels,
        "embeddings": args.embeddings,
        "device": args.device,
        "connect_deadline_s": args.connect_deadline_s,
    }
    content |= {key: value for key, value in given.items() if value is not None}
    settings = check(with_overrides(content, args.set, source), SiteSettings, source)
    code = [*settings.code, *(_digest(entry) for entry in args.code)]
    # who names the code that may run lets code run
    more: list[TaskKind] = [*args.allow, "code"] if code else args.allow
    allowed = list(dict.fromkeys([*settings.allow, *more]))
    return settings.model_copy(update={"allow": allowed, "code": code})


def _digest(entry: str) -> str:
    """Return what `--code` says as the settings say it: a file, which may be anywhere, by its content."""
    return sha256_file(entry) if Path(entry).is_file() else entry
