"""``fedbio server``: the coordinator's process."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedbio.errors import SettingsError
from fedbio.settings import JobsFile, KitFile, load

EXAMPLE = "fedbio server --kit federation/server --jobs config/jobs/classify.yaml -o results/server"

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--kit", type=Path, required=True, metavar="DIR", help="the server's start-up kit")
    parser.add_argument("--jobs", type=Path, required=True, metavar="FILE", help="what to run: YAML, JSON or TOML")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for what the server keeps"
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="where to listen (default: the kit's port)")
    parser.add_argument(
        "--serve",
        action="store_true",
        help="when the jobs are done, wait for more: in the jobs file, or submitted by `fedbio job`",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the server until its jobs are done."""
    from fedbio.federation.job_files import check_job_files
    from fedbio.federation.server import Server
    from fedbio.transport import Credentials

    kit = load_kit(args.kit, "server")
    jobs = load(args.jobs, JobsFile)
    if not jobs.jobs and not args.serve:
        raise SettingsError(f"{args.jobs}: jobs: there are none; name at least one, or wait for some with --serve")
    check_job_files(jobs.jobs, args.jobs.parent, args.jobs)
    Server(
        kit=kit,
        credentials=Credentials.from_kit(args.kit),
        jobs=jobs,
        workspace=args.output,
        code=args.jobs.parent,
        listen=args.listen or listen_address(kit.server),
        save_model=lambda params, publication: _save_model(args.output, params, publication),
    ).run(more_jobs=_changes(args.jobs) if args.serve else None)
    if not args.json:
        print(f"jobs done: {', '.join(job.name for job in jobs.jobs)}; results in {args.output}")
    return {"jobs": [job.name for job in jobs.jobs], "output": str(args.output)}


def load_kit(folder: Path, role: str) -> KitFile:
    """Read a start-up kit and see that it is one for this role."""
    kit = load(folder / "kit.yaml", KitFile)
    if kit.role != role:
        raise SettingsError(
            f"{folder / 'kit.yaml'}: role: the kit of {kit.party} is for {_a(kit.role)}, not for {_a(role)}"
        )
    return kit


def _a(role: str) -> str:
    return f"{'an' if role == 'admin' else 'a'} {role}"


def listen_address(address: str) -> str:
    """Return where a server listens that sites reach at `address`: on all interfaces, or on loopback alone."""
    host, _, port = address.rpartition(":")
    return address if host == "localhost" or host.startswith("127.") or host == "[::1]" else f"0.0.0.0:{port}"


def _save_model(workspace: Path, params: Any, publication: Any) -> None:
    # imported here: a server that is still waiting for sites needs none of it
    from fedbio.executors.publish import save_global

    save_global(workspace, params, publication)


def _changes(path: Path) -> Callable[[], JobsFile | None]:
    """Return what looks whether a jobs file has changed; an invalid one is said once and not taken."""
    before = path.stat().st_mtime_ns
    log.info("waiting for more jobs in %s, and for those of administrators", path)

    def look() -> JobsFile | None:
        nonlocal before
        try:
            now = path.stat().st_mtime_ns
        except FileNotFoundError:
            return None  # an editor puts a new one in its place
        if now == before:
            return None
        before = now
        try:
            return load(path, JobsFile)
        except SettingsError as error:
            log.warning("jobs file not taken, the old one stays: %s", error)
            return None

    return look
