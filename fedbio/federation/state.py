"""The server's memory: one SQLite file in write-ahead mode and model files; killed at any moment, it is consistent.

A model file is written whole before the row that names it, and removed only after no row names it any more.
"""

from __future__ import annotations

__all__ = ["JobRow", "Progress", "State"]

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from fedbio.errors import FormatError, SettingsError
from fedbio.federation.model import Parameters
from fedbio.results import Metric, utc_now
from fedbio.tensors import open_file, write_file

SCHEMA_VERSION = 3

_SCHEMA = """
create table sites (name text primary key, version text, first_joined text, last_joined text);
create table jobs (name text primary key, digest text, started text, finished text, state text default 'waiting',
                   reason text default '', origin text default 'file', content text default '', submitted text,
                   files text default '{}');
create table notes (job text, key text, value blob, primary key (job, key));
create table runs (job text, run text, round integer, best_round integer, best_value real, finished integer,
                   primary key (job, run));
create table metrics (job text, party text, model text, split text, seed integer, round integer, metric text,
                      value real, primary key (job, party, model, split, seed, round, metric));
"""

_FROM_1 = """
alter table jobs add column state text default 'waiting';
alter table jobs add column reason text default '';
alter table jobs add column origin text default 'file';
alter table jobs add column content text default '';
alter table jobs add column submitted text;
update jobs set submitted = started, state = case when finished is null then 'waiting' else 'done' end;
"""
"""What a state of version 1, which knew no queue, lacks."""

_FROM_2 = """
alter table jobs add column files text default '{}';
"""
"""What a state of version 2, which did not know the jobs' files, lacks."""

_UPGRADES = {0: _SCHEMA, 1: _FROM_1 + _FROM_2, 2: _FROM_2}

T = TypeVar("T")


class JobRow(NamedTuple):
    """A job as it stands; `content` is a jobs file with this job alone, as JSON, times are ISO 8601 or None."""

    name: str
    state: str
    reason: str
    origin: str
    content: str
    submitted: str | None
    started: str | None
    finished: str | None


class Progress(msgspec.Struct, frozen=True):
    """How far a run of federated averaging has come.

    Parameters
    ----------
    round : int
        The round of the model saved last; round 0 is the initial model.
    best_round : int
        The round of the best model so far.
    best_value : float or None
        What made it the best; None before anything was measured.
    finished : bool
    """

    round: int = 0
    best_round: int = 0
    best_value: float | None = None
    finished: bool = False


class State:
    """Opens, or makes, a server's memory in a folder. Safe to use from several threads."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "state.sqlite"
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            version = self._database.execute("pragma user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{path}: not a server's state ({error}); choose another workspace") from error
        if version in _UPGRADES:
            upgrade = _UPGRADES[version]
            self._database.executescript(f"begin; {upgrade} pragma user_version = {SCHEMA_VERSION}; commit;")
        elif version != SCHEMA_VERSION:
            raise FormatError(
                f"{path}: state of version {version}, this release reads version {SCHEMA_VERSION}; "
                "finish the job with the release that began it, or choose another workspace"
            )

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def _write(self, statement: str, *values: Any) -> None:
        with self._lock:
            self._database.execute(statement, values)

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    def joined(self, site: str, version: str) -> None:
        """Remember that a site has joined."""
        self._write(
            "insert into sites values (?1, ?2, ?3, ?3) on conflict do update set version = ?2, last_joined = ?3",
            site, version, utc_now(),
        )  # fmt: skip

    def known_sites(self) -> list[str]:
        """Return every site that has ever joined, sorted."""
        return [name for (name,) in self._read("select name from sites order by name")]

    def begin(
        self,
        job: str,
        settings: bytes,
        *,
        files: Mapping[str, str] | None = None,
        origin: str = "file",
        content: str = "",
    ) -> bool:
        """Enter a job, or find it again; return True if it is done already.

        Parameters
        ----------
        job : str
        settings : bytes
            What must not change.
        files : mapping of str to str, optional
            SHA-256 of the files that the job names, by name; they must not change once something has come of it.
        origin : str
            Where it comes from; kept from the first time.
        content : str
            All that is needed to run it again without where it came from.

        Raises
        ------
        SettingsError
            If the job was begun with other settings, or other files, in this workspace.
        """
        files = files or {}
        digest = hashlib.sha256(settings).hexdigest()
        self._write(
            "insert or ignore into jobs (name, digest, origin, content, submitted) values (?, ?, ?, ?, ?)",
            job, digest, origin, content, utc_now(),
        )  # fmt: skip
        if change := self.change(job, settings, files):
            raise SettingsError(
                f"job {job!r} was begun in {self.folder} with {change}; take back the change, or give the job another "
                "name or the server another workspace (-o; with Snakemake: --config run=NAME)"
            )
        [(state, known)] = self._read("select state, files from jobs where name = ?", job)
        # what runs has been begun with the files as they were
        if state != "running":
            whole = {**msgspec.json.decode(known), **files}
            self._write("update jobs set files = ? where name = ?", msgspec.json.encode(whole).decode(), job)
        return bool(state == "done")

    def change(self, job: str, settings: bytes, files: Mapping[str, str]) -> str:
        """Return what a job was begun with that is not as in `begin`, such as "other settings"; empty if nothing."""
        for digest, known in self._read("select digest, files from jobs where name = ?", job):
            if digest != hashlib.sha256(settings).hexdigest():
                return "other settings"
            before = msgspec.json.decode(known, type=dict[str, str])
            changed = [name for name in sorted(files) if before.get(name, files[name]) != files[name]]
            # a script that failed at once may be mended
            if changed and self.has_results(job):
                return f"another {', '.join(changed)}"
        return ""

    def has_results(self, job: str | None = None) -> bool:
        """Whether anything has come of a job, or of any: it is done, or has come past round 0, or has metrics."""
        rows = self._read(
            "select 1 from jobs where state = 'done' and (?1 is null or name = ?1) "
            "union select 1 from runs where round > 0 and (?1 is null or job = ?1) "
            "union select 1 from metrics where ?1 is null or job = ?1",
            job,
        )
        return bool(rows)

    def move(self, job: str, state: str, reason: str = "") -> None:
        """Note that a job is waiting, running, done, failed or aborted now."""
        now = utc_now()
        self._write(
            "update jobs set state = ?2, reason = ?3, started = case when ?2 = 'running' then coalesce(started, ?4) "
            "else started end, finished = case when ?2 in ('waiting', 'running') then null else ?4 end where name = ?1",
            job, state, reason, now,
        )  # fmt: skip

    def finish(self, job: str) -> None:
        """Note that a job is done."""
        self.move(job, "done")

    def reopen(self) -> None:
        """Have jobs of the server's own file that had failed, or were running, wait again: the server starts anew."""
        self._write("update jobs set state = 'waiting' where origin = 'file' and state in ('running', 'failed')")

    def state_of(self, job: str) -> str | None:
        """Return how a job stands, or None if there is none of this name."""
        rows = self._read("select state from jobs where name = ?", job)
        return rows[0][0] if rows else None

    def jobs(self) -> list[JobRow]:
        """Return all jobs in the order in which they came."""
        columns = ", ".join(JobRow._fields)
        return [JobRow(*row) for row in self._read(f"select {columns} from jobs order by rowid")]  # noqa: S608

    def runs(self, job: str) -> dict[str, Progress]:
        """Return how far each run of a job has come."""
        names = [name for (name,) in self._read("select run from runs where job = ? order by run", job)]
        return {name: found for name in names if (found := self.progress(job, name))}

    def note(self, job: str, key: str, value: Any) -> None:
        """Keep something that a job found out; `value` is anything that msgspec can encode."""
        self._write("insert or replace into notes values (?, ?, ?)", job, key, msgspec.json.encode(value))

    def noted(self, job: str, key: str, kind: type[T]) -> T | None:
        """Return what a job noted, or None."""
        rows = self._read("select value from notes where job = ? and key = ?", job, key)
        return msgspec.json.decode(rows[0][0], type=kind) if rows else None

    def store(self, job: str, name: str, parameters: Parameters) -> None:
        """Keep named tensors of a job."""
        write_file(self._path(job, name), parameters)

    def stored(self, job: str, name: str) -> Parameters | None:
        """Return named tensors of a job, or None."""
        path = self._path(job, name)
        return dict(open_file(path)) if path.exists() else None

    def _path(self, job: str, name: str) -> Path:
        return self.folder / "models" / job / f"{name}.safetensors"

    def model_path(self, job: str, run: str, round_number: int) -> Path:
        """Return where the model of a round is, or shall be written before the round is saved."""
        return self._path(job, _model_name(run, round_number))

    def progress(self, job: str, run: str) -> Progress | None:
        """Return how far a run has come, or None if it has not begun."""
        statement = "select round, best_round, best_value, finished from runs where job = ? and run = ?"
        for number, best_round, best_value, finished in self._read(statement, job, run):
            return Progress(number, best_round, best_value, bool(finished))
        return None

    def save(self, job: str, run: str, progress: Progress, parameters: Parameters | None = None) -> None:
        """Save a round: the model of `progress.round`, if it is not in its file yet, then the row; older ones go."""
        if parameters is not None:
            self.store(job, _model_name(run, progress.round), parameters)
        self._write(
            "insert or replace into runs values (?, ?, ?, ?, ?, ?)",
            job, run, progress.round, progress.best_round, progress.best_value, progress.finished,
        )  # fmt: skip
        kept = {_model_name(run, progress.best_round), _model_name(run, progress.round)}
        for path in (self.folder / "models" / job / run).glob("round-*.safetensors"):
            if f"{run}/{path.stem}" not in kept:
                path.unlink()

    def model(self, job: str, run: str, round_number: int) -> Parameters:
        """Return the model of a round that `progress` names."""
        return dict(open_file(self.model_file(job, run, round_number)))

    def model_file(self, job: str, run: str, round_number: int) -> Path:
        """Return the file of the model of a round that `progress` names."""
        path = self.model_path(job, run, round_number)
        if not path.exists():
            raise FormatError(
                f"{self.folder}: the model of round {round_number} of {run} is gone; start again in a new workspace"
            )
        return path

    def add_metrics(self, job: str, rows: Iterable[Metric]) -> None:
        """Add rows to a job's table; a row that is there already is replaced."""
        # the database rolls back what an error ends: an open transaction would let no later one begin
        with self._lock, self._database:
            self._database.execute("begin")
            self._database.executemany(
                "insert or replace into metrics values (?, ?, ?, ?, ?, ?, ?, ?)", ((job, *row) for row in rows)
            )

    def metrics(self, job: str | None = None) -> list[Metric]:
        """Return a job's table, or that of all jobs, in a fixed order."""
        rows = self._read(
            "select party, model, split, seed, round, metric, value from metrics where ?1 is null or job = ?1 "
            "order by job, model, seed, party, split, metric, round",
            job,
        )
        return [Metric(*row) for row in rows]


def _model_name(run: str, round_number: int) -> str:
    return f"{run}/round-{round_number:05}"
