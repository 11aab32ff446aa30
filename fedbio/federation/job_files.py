"""The files that a job names: which they are, and whether they are there."""

from __future__ import annotations

__all__ = ["PLAIN_NAME", "check_job_files", "file_digests", "files_of"]

import re
from collections.abc import Iterable
from pathlib import Path

from fedbio.errors import SettingsError
from fedbio.files import sha256_file
from fedbio.settings import Job
from fedbio.settings_jobs import CustomJob, EvaluationJob, ScriptJob

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A file's name without any folder: what is joined to a folder by it stays in that folder."""


def files_of(job: Job) -> tuple[str, ...]:
    """Return the names of the files beside the job file that a job needs, each once.

    Raises
    ------
    SettingsError
        If one is not a plain name, or the function that makes the initial model is in a file that is not streamed.
    """
    names: list[str] = []
    client = job.client if isinstance(job, (ScriptJob, CustomJob)) else None
    if client is not None:
        names += [client.script, *client.files]
        if client.initial and (source := client.initial.partition(":")[0]) not in names:
            raise SettingsError(
                f"job {job.name}: client.initial: {source} is not sent to the sites; add it to client.files"
            )
    if isinstance(job, CustomJob):
        names.append(job.controller.partition(":")[0])
    if model := getattr(job, "model", None):
        names.append(model)
    if isinstance(job, EvaluationJob):
        names += job.models
    for name in names:
        if not PLAIN_NAME.fullmatch(name):
            raise SettingsError(f"job {job.name}: {name!r}: expected the plain name of a file beside the job file")
    return tuple(dict.fromkeys(names))


def file_digests(job: Job, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that a job names, by name, of those that are in a folder."""
    paths = {name: folder / name for name in files_of(job)}
    return {name: sha256_file(path) for name, path in paths.items() if path.is_file()}


def check_job_files(jobs: Iterable[Job], folder: Path, source: str | Path) -> dict[str, Path]:
    """Return the files that jobs name, by name.

    Parameters
    ----------
    jobs : iterable of Job
    folder : Path
        Where they shall be.
    source : str or Path
        What messages call the job file.

    Raises
    ------
    SettingsError
        Naming every file that is not there, and whose it is.
    """
    found: dict[str, Path] = {}
    missing = []
    for job in jobs:
        for name in files_of(job):
            found[name] = folder / name
            if not found[name].is_file():
                missing.append(
                    f"{source}: job {job.name}: there is no file {name} in {folder}; put it beside the job file"
                )
    if missing:
        raise SettingsError("\n".join(missing))
    return found
