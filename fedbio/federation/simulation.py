"""Play all parties of a federation on this machine, each as a process of its own over mutual TLS."""

from __future__ import annotations

__all__ = ["simulate"]

import logging
import os
import shutil
import socket
import sys
from pathlib import Path

import yaml

from fedbio.errors import SettingsError
from fedbio.federation.party import UNFINISHED
from fedbio.federation.supervisor import Process, supervise
from fedbio.files import write_whole
from fedbio.provision import provision
from fedbio.results import PARTY_FILE, read_party
from fedbio.settings import FederationFile, RunSettings, ServerParty, Transport

log = logging.getLogger(__name__)

SERVER = "server"


def simulate(settings: RunSettings, run: Path, data: Path) -> None:
    """Run a server and all sites to their end; a run that was broken off goes on where it was.

    Parameters
    ----------
    settings : RunSettings
    run : Path
        Gets ``federation/`` (kits and job file), one folder per party, and ``global/``, the model.
    data : Path
        The folder with one ``NAME.fasta`` per site.

    Raises
    ------
    FedbioError
        If a party fails: names it and shows its last lines, with its exit code.
    """
    files = {site: data / f"{site}.fasta" for site in settings.sites.names}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise SettingsError(
            f"{', '.join(missing)}: not found; make the sites' files with `fedbio data split ... -o {data}`"
        )
    address = f"127.0.0.1:{_free_port()}"
    kits = run / "federation"
    provision(
        FederationFile(
            federation="simulation",
            server=ServerParty(address=address),
            sites=settings.sites.names,
            admin=None,
            driver=settings.driver,
        ),
        kits,
    )
    jobs = kits / "jobs.yaml"
    wanted = settings.jobs().model_dump(mode="json")
    if _is_finished(run, [SERVER, *files], wanted):
        log.info("nothing to do, every party has finished these jobs")
        return
    write_whole(jobs, yaml.safe_dump(wanted, sort_keys=False))
    # the port is free now, and may be another one than in a run that was broken off
    server = ["server", "--kit", kits / SERVER, "--jobs", jobs, "-o", run / SERVER, "--listen", address]
    threads = max(1, len(os.sched_getaffinity(0)) // settings.sites.count)
    processes = [_process(SERVER, run, server)]
    same = _as_overrides(settings)
    for site, path in files.items():
        arguments = ["site", "--kit", kits / site, "--data", path, "-o", run / site, "--server", address]
        arguments += ["--device", settings.device, "--threads", threads]
        arguments += ["--embeddings", settings.embeddings] if settings.embeddings else []
        arguments += ["--allow", "map"] if settings.report.map else []
        arguments += ["--synthetic"] if settings.dataset == "demo" else []
        arguments += same
        processes.append(_process(site, run, arguments))
    supervise(processes, {**os.environ, "PYTHONUNBUFFERED": "1"})
    _copy_model(run / SERVER / "global", run / "global")


def _as_overrides(settings: RunSettings) -> list[str]:
    """Return what the server is given in its jobs file, as arguments of a site."""
    chosen = settings.transport.model_dump(include=set(Transport.model_fields))
    changed = {key: value for key, value in chosen.items() if value != Transport.model_fields[key].default}
    pairs = {"heartbeat_s": settings.federation.heartbeat_s, **{f"transport.{key}": changed[key] for key in changed}}
    return [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")]


def _process(name: str, run: Path, arguments: list[object]) -> Process:
    return Process(name, [sys.executable, "-m", "fedbio", *map(str, arguments)], run / name / "log.txt")


def _is_finished(run: Path, parties: list[str], jobs: dict[str, object]) -> bool:
    if not all((run / party / PARTY_FILE).exists() and not (run / party / UNFINISHED).exists() for party in parties):
        return False
    return read_party(run / SERVER / PARTY_FILE).settings == jobs and (run / "global").exists()


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    # the card last: it names the digest of the other file
    for path in sorted(source.iterdir(), key=lambda path: path.suffix == ".json"):
        shutil.copyfile(path, target / path.name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
