"""``fedbio server``: the coordinator's process."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from fedbio.errors import SettingsError
from fedbio.settings import JobsFile, KitFile, load

EXAMPLE = "fedbio server --kit federation/server --jobs config/jobs/classify.yaml -o results/server"

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""Seconds between two looks at the jobs file of a server that goes on serving."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--kit", type=Path, required=True, metavar="DIR", help="the server's start-up kit")
    parser.add_argument("--jobs", type=Path, required=True, metavar="YAML", help="what to run")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for what the server keeps"
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="where to listen (default: the kit's port)")
    parser.add_argument("--serve", action="store_true", help="when the jobs are done, wait for more in the jobs file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the server until its jobs are done."""
    from fedbio.federation.server import Server
    from fedbio.transport import Credentials

    kit = load_kit(args.kit, "server")
    jobs = load(args.jobs, JobsFile)
    Server(
        kit=kit,
        credentials=Credentials.from_kit(args.kit),
        jobs=jobs,
        workspace=args.output,
        code=args.jobs.parent,
        listen=args.listen or listen_address(kit.server),
        save_model=lambda params, publication: _save_model(args.output / "global", params, publication),
    ).run(more_jobs=(lambda: _wait_for_change(args.jobs)) if args.serve else None)
    if not args.json:
        print(f"jobs done: {', '.join(job.name for job in jobs.jobs)}; results in {args.output}")
    return {"jobs": [job.name for job in jobs.jobs], "output": str(args.output)}


def load_kit(folder: Path, role: str) -> KitFile:
    """Read a start-up kit and see that it is one for this role."""
    kit = load(folder / "kit.yaml", KitFile)
    if kit.role != role:
        raise SettingsError(
            f"{folder / 'kit.yaml'}: role: the kit of {kit.party} is for a {kit.role}, not for a {role}"
        )
    return kit


def listen_address(address: str) -> str:
    """Return where a server listens that sites reach at `address`: on all interfaces, or on loopback alone."""
    host, _, port = address.rpartition(":")
    return address if host == "localhost" or host.startswith("127.") or host == "[::1]" else f"0.0.0.0:{port}"


def _save_model(folder: Path, params: Any, publication: Any) -> None:
    # imported here: a server that is still waiting for sites needs none of it
    from fedbio.executors.publish import save_global

    save_global(folder, params, publication)


def _wait_for_change(path: Path) -> JobsFile:
    before = path.stat().st_mtime_ns
    log.info("jobs done, waiting for more in %s", path)
    while True:
        time.sleep(LOOK_EVERY_S)
        if path.stat().st_mtime_ns != before:
            before = path.stat().st_mtime_ns
            try:
                return load(path, JobsFile)
            except SettingsError as error:
                log.warning("jobs file not taken, the old one stays: %s", error)
