"""Play all parties of a federation on this machine: each a process of its own, or many sites on a pool of processes."""

from __future__ import annotations

__all__ = ["Simulation", "check_dealt", "check_sites", "simulate"]

import contextlib
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import yaml

from fedbio.errors import SettingsError
from fedbio.federation import simulation_inputs as inputs
from fedbio.federation.model import Parameters
from fedbio.federation.party import UNFINISHED
from fedbio.federation.simulation_pool import play
from fedbio.federation.supervisor import Process, supervise
from fedbio.files import write_whole
from fedbio.nursery import NURSERY, nursery, preloadable
from fedbio.provision import provision
from fedbio.results import PARTY_FILE, read_party
from fedbio.settings import MOST_LAST_LINES, FederationFile, JobsFile, ServerParty, TaskKind, Transport
from fedbio.settings_jobs import ScriptJob
from fedbio.settings_parts import DRIVER

log = logging.getLogger(__name__)

SERVER = "server"

HANDFUL = 8
"""More sites than these are played by a pool of processes, if nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is played.

    Parameters
    ----------
    jobs : JobsFile
        With the names of all sites.
    sites : mapping of str to Path
        Each site's file of proteins.
    files : mapping of str to Path
        Those that jobs name.
    allow : tuple of str
        Kinds of task that every site takes beside the usual ones; ``code`` lets any script run.
    driver, device, embeddings, synthetic
        See `fedbio.settings.RunSettings` and `fedbio.federation.Site`.
    save_model : callable
        Writes the model that a job publishes into a party's workspace, see `fedbio.federation.Server`.
    """

    jobs: JobsFile
    sites: Mapping[str, Path]
    files: Mapping[str, Path] = field(default_factory=dict)
    allow: tuple[TaskKind, ...] = ()
    driver: str = DRIVER
    device: str = "auto"
    embeddings: str | None = None
    synthetic: bool = False
    save_model: Callable[[Path, Parameters, msgspec.Struct], None]

    @property
    def threads(self) -> int:
        """Threads with which each site computes: the same, and thus the same bits, whoever plays it."""
        return max(1, len(os.sched_getaffinity(0)) // len(self.sites))


def simulate(what: Simulation, run: Path, *, processes: int | None = None) -> None:
    """Run a server and all sites to their end; a run that was broken off goes on where it was.

    Parameters
    ----------
    what : Simulation
    run : Path
        Gets ``federation/`` (kits and job file), one folder per party, and ``global/``, the model.
    processes : int, optional
        That play the sites; 0 for each site one of its own. By default that is so up to `HANDFUL` sites, and more of
        them are played by as many processes as there are processors.

    Raises
    ------
    SettingsError
        If `run` holds the results of other sites, proteins or jobs; nothing in it is changed then.
    FedbioError
        If a party fails: names it and shows its last lines, with its exit code.
    """
    missing = [str(path) for path in what.sites.values() if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SettingsError(
            f"{', '.join(missing[:3])}{more}: not found; make the sites' files with "
            f"`fedbio data split ... -o {Path(missing[0]).parent}`"
        )
    check_sites(run, what.sites)
    inputs.check_jobs(run, run / SERVER, what.jobs.jobs, what.files)
    inputs.check_proteins(run, run / SERVER, what.sites)
    kits = run / "federation"
    address = f"127.0.0.1:{_free_port()}"
    provision(
        FederationFile(
            federation="simulation",
            server=ServerParty(address=address),
            sites=list(what.sites),
            driver=what.driver,
        ),
        kits,
    )
    wanted = what.jobs.model_dump(mode="json")
    if _is_finished(run, [SERVER, *what.sites], wanted):
        log.info("nothing to do, every party has finished these jobs")
        return
    for name, path in what.files.items():
        shutil.copyfile(path, kits / name)
    write_whole(kits / "jobs.yaml", yaml.safe_dump(wanted, sort_keys=False))
    if processes is None:
        processes = 0 if len(what.sites) <= HANDFUL else len(os.sched_getaffinity(0))
    if processes:
        play(what, run, kits, processes)
    else:
        _supervise(what, run, kits, address)
    for model in _published(run):
        _copy_model(model, run / model.relative_to(run / SERVER))


def check_sites(run: Path, sites: Iterable[str]) -> None:
    """Raise `SettingsError` if a run has results, of other sites than these: before proteins are dealt out to them."""
    inputs.check_sites(run, run / SERVER, sites)


def check_dealt(run: Path) -> None:
    """Raise `SettingsError` if a run has results: before its proteins are dealt out otherwise."""
    inputs.check_dealt(run, run / SERVER)


def _supervise(what: Simulation, run: Path, kits: Path, address: str) -> None:
    """Run each party as a process of its own over mutual TLS."""
    # the port is free now, and may be another one than in a run that was broken off
    server = ["server", "--kit", kits / SERVER, "--jobs", kits / "jobs.yaml", "-o", run / SERVER, "--listen", address]
    processes = [_process(SERVER, run, server)]
    same = _as_overrides(what.jobs)
    for site, path in what.sites.items():
        arguments = ["site", "--kit", kits / site, "--data", path, "-o", run / site, "--server", address]
        arguments += ["--device", what.device, "--threads", what.threads]
        arguments += ["--embeddings", what.embeddings] if what.embeddings else []
        arguments += [part for kind in what.allow for part in ("--allow", kind)]
        arguments += ["--code", "any"] if "code" in what.allow else []
        arguments += ["--synthetic"] if what.synthetic else []
        # whoever plays all parties knows all proteins
        arguments += ["--set", "min_count=1", "--set", f"last_lines={MOST_LAST_LINES}"]
        arguments += same
        processes.append(_process(site, run, arguments))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with contextlib.ExitStack() as stack:
        scripts = [path.read_text(errors="replace") for path in what.files.values() if path.suffix == ".py"]
        alone = any(isinstance(job, ScriptJob) and job.client.launch == "process" for job in what.jobs.jobs)
        if alone and (libraries := preloadable(scripts)) is not None:
            path_of = stack.enter_context(nursery(libraries, run / "nursery.txt", threads=what.threads))
            environment |= {NURSERY: path_of}
        supervise(processes, environment)


def _as_overrides(jobs: JobsFile) -> list[str]:
    """Return what the server is given in its jobs file, as arguments of a site."""
    chosen = jobs.transport.model_dump(include=set(Transport.model_fields))
    changed = {key: value for key, value in chosen.items() if value != Transport.model_fields[key].default}
    pairs = {"heartbeat_s": jobs.federation.heartbeat_s, **{f"transport.{key}": changed[key] for key in changed}}
    return [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")]


def _process(name: str, run: Path, arguments: list[object]) -> Process:
    return Process(name, [sys.executable, "-m", "fedbio", *map(str, arguments)], run / name / "log.txt")


def _is_finished(run: Path, parties: list[str], jobs: dict[str, object]) -> bool:
    if not all((run / party / PARTY_FILE).exists() and not (run / party / UNFINISHED).exists() for party in parties):
        return False
    whole = all((run / model.relative_to(run / SERVER)).exists() for model in _published(run))
    return read_party(run / SERVER / PARTY_FILE).settings == jobs and whole


def _published(run: Path) -> list[Path]:
    """Return the folders of the models that jobs have published."""
    return sorted([*(run / SERVER).glob("global"), *(run / SERVER).glob("studies/*/global")])


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
