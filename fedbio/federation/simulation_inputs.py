"""What a simulation's folder holds the results of: it is not taken for those of other sites, proteins or jobs."""

from __future__ import annotations

__all__ = ["INPUTS_FILE", "check_dealt", "check_jobs", "check_proteins", "check_sites"]

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from fedbio.errors import FormatError, SettingsError
from fedbio.federation.job_files import files_of
from fedbio.federation.state import State
from fedbio.files import sha256_file, write_whole
from fedbio.settings import Job

INPUTS_FILE = "simulation.json"
"""In the run's folder: each site's file of proteins as it was when the run began."""

NAMED = 3
"""Of the sites that have changed, how many a message names."""


class _SiteFile(msgspec.Struct, frozen=True):
    size: int
    mtime_ns: int
    sha256: str


class _Inputs(msgspec.Struct, frozen=True):
    sites: dict[str, _SiteFile]
    format: Literal["fedbio-simulation"] = "fedbio-simulation"
    version: Literal[1] = 1


def check_sites(run: Path, server: Path, names: Iterable[str]) -> None:
    """Raise `SettingsError` if a run has results, of other sites than these.

    Parameters
    ----------
    run : Path
        The run's folder.
    server : Path
        Its server's workspace.
    names : iterable of str
    """
    before = _read(run)
    if before is not None and set(before.sites) != set(names) and _has_results(server):
        raise _refusal(run, f"other sites ({_named(list(before.sites))})")


def check_dealt(run: Path, server: Path) -> None:
    """Raise `SettingsError` if a run has results: of proteins that were dealt out otherwise than they shall be now."""
    if _has_results(server):
        raise _refusal(run, "other proteins (they were dealt out otherwise)")


def check_proteins(run: Path, server: Path, sites: Mapping[str, Path]) -> None:
    """Raise `SettingsError` if a run has results, of other proteins than in these files; else note what they are.

    A file of the same size and time of change is taken to be the same.
    """
    before = _read(run)
    known = before.sites if before is not None else {}
    now = {name: _look_at(path, known.get(name)) for name, path in sites.items()}
    changed = [name for name, file in now.items() if name in known and known[name].sha256 != file.sha256]
    if changed and _has_results(server):
        raise _refusal(run, f"other proteins ({_named(changed)} {'has' if len(changed) == 1 else 'have'} changed)")
    if now != known:
        write_whole(run / INPUTS_FILE, msgspec.json.encode(_Inputs(now)))


def check_jobs(run: Path, server: Path, jobs: Iterable[Job], files: Mapping[str, Path]) -> None:
    """Raise `SettingsError` if one of these jobs was begun in a run with other settings, or other files."""
    if not _has_begun(server):
        return
    state = State(server)
    try:
        for job in jobs:
            digests = {name: sha256_file(files[name]) for name in files_of(job) if name in files}
            if change := state.change(job.name, job.model_dump_json().encode(), digests):
                raise _refusal(run, f"another job ({job.name} was begun with {change})")
    finally:
        state.close()


def _read(run: Path) -> _Inputs | None:
    path = run / INPUTS_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Inputs)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{path}: not what this release notes of a run ({error}); give another output") from error


def _look_at(path: Path, known: _SiteFile | None) -> _SiteFile:
    found = path.stat()
    if known is not None and (known.size, known.mtime_ns) == (found.st_size, found.st_mtime_ns):
        return known
    return _SiteFile(found.st_size, found.st_mtime_ns, sha256_file(path))


def _has_begun(server: Path) -> bool:
    return (server / "state.sqlite").exists()


def _has_results(server: Path) -> bool:
    if not _has_begun(server):
        return False
    state = State(server)
    try:
        return state.has_results()
    finally:
        state.close()


def _named(sites: list[str]) -> str:
    more = f" and {len(sites) - NAMED} more" if len(sites) > NAMED else ""
    return f"{', '.join(sites[:NAMED])}{more}"


def _refusal(run: Path, results: str) -> SettingsError:
    return SettingsError(
        f"{run} holds the results of {results}; delete it or give another output (-o; with Snakemake: "
        "--config run=NAME), or take back the change"
    )
