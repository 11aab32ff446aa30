"""``fedbio site``: the process of one institution."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from fedbio.errors import SettingsError
from fedbio.settings import SiteSettings, TaskKind, check, load

EXAMPLE = "fedbio site --kit site-1 --data proteins.fasta -o results/site --allow map"


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
    from fedbio.federation.site import Site
    from fedbio.transport import Credentials

    if not Path(settings.proteins).is_file():
        raise SettingsError(f"{settings.proteins}: there is no such file of proteins; check the path")
    Site(
        kit=load_kit(Path(settings.kit), "site"),
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
        prepare=load_libraries,
    ).run()
    if not args.json:
        print(f"done; everything that this site keeps is in {args.output}")
    return {"output": str(args.output), "model": str(args.output / "global")}


def _settings(args: argparse.Namespace) -> SiteSettings:
    """Return the settings of the file, or of the arguments; an argument comes before the file."""
    if args.settings is None and not (args.kit and args.data):
        raise SettingsError("fedbio site: give --kit and --data, or --settings with a site's settings file")
    content: dict[str, Any] = {"party": "site"}
    source: str | Path = "arguments"
    if args.settings is not None:
        source = args.settings
        content = load(args.settings, SiteSettings, args.set).model_dump()
    given = {
        "kit": args.kit,
        "proteins": args.data,
        "labels": args.labels,
        "embeddings": args.embeddings,
        "device": args.device,
        "connect_deadline_s": args.connect_deadline_s,
    }
    content |= {key: value for key, value in given.items() if value is not None}
    settings = check(content, SiteSettings, source)
    allowed = [*settings.allow, *(kind for kind in args.allow if kind not in settings.allow)]
    return settings.model_copy(update={"allow": allowed})
