"""What a server and a site have in common: a workspace with its lock, its event log, and the record of the run."""

from __future__ import annotations

__all__ = ["UNFINISHED", "Party"]

import contextlib
import importlib.metadata
import platform
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from fedbio import __version__
from fedbio.errors import FormatError
from fedbio.federation.ledger import Ledger
from fedbio.files import exclusive_lock, write_whole
from fedbio.results import PARTY_FILE, EventLog, PartyRecord, read_party, utc_now, write_party

UNFINISHED = "unfinished.json"
"""The record of a run that has not come to its end, from which a restarted process goes on."""

FINISHED = "finished.json"
"""A second copy of ``party.json``: Snakemake removes that one before it runs a rule again."""


class Party:
    """Keeps a party's record of one run, across restarts."""

    def __init__(self, workspace: Path, name: str, role: Literal["server", "site"]) -> None:
        self.workspace, self.name = workspace, name
        self.events = EventLog(workspace, name)
        path = workspace / UNFINISHED
        known = read_party(path) if path.exists() else None
        before = None if known else _finished_record(workspace, name, role)
        self.record = known or before or PartyRecord(name, role, started=utc_now())
        self.ledger = Ledger(self.record, self.events)
        if known or before:
            self.ledger.recount(self.events.path, self.record.started)
        self.events.write("continued" if known or before else "started", version=__version__)
        self._saving = threading.Lock()
        self._finished = before is not None
        self.save()

    @classmethod
    @contextlib.contextmanager
    def open(cls, workspace: Path, name: str, role: Literal["server", "site"]) -> Iterator[Party]:
        """Take hold of a workspace: a second process on it is refused, with the id of the first."""
        with exclusive_lock(workspace / ".lock", f"workspace {workspace}"):
            party = cls(workspace, name, role)
            try:
                yield party
            finally:
                party.events.close()

    def save(self) -> None:
        """Save the record as far as it has come. Safe to call from several threads."""
        if self._finished:
            return
        with self._saving:
            write_whole(self.workspace / UNFINISHED, msgspec.json.encode(self.record))

    def reopen(self) -> None:
        """Go on with a record that was finished: something is to be done. Safe to call from several threads."""
        if self._finished:
            self._finished = False
            self.save()

    def finish(self, libraries: Sequence[str]) -> None:
        """Write ``party.json``: the run has come to its end; after one that found nothing to do it stays as it is."""
        if self._finished:
            self.events.write("finished")
            if not (self.workspace / PARTY_FILE).exists():
                write_whole(self.workspace / PARTY_FILE, (self.workspace / FINISHED).read_bytes())
            return
        self.record.finished = utc_now()
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.record.peak_memory_bytes = max(peak, self.record.peak_memory_bytes)
        self.record.versions = {
            "fedbio": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        }
        self.events.write("finished")
        party = write_party(self.workspace, self.record)
        write_whole(self.workspace / FINISHED, party.read_bytes())
        (self.workspace / UNFINISHED).unlink(missing_ok=True)


def _finished_record(workspace: Path, name: str, role: str) -> PartyRecord | None:
    """Return what this party has written at its end, if it has come to one here."""
    for path in (workspace / PARTY_FILE, workspace / FINISHED):
        with contextlib.suppress(FileNotFoundError, FormatError):
            record = read_party(path)
            # `fedbio train` may have written into the same folder
            if (record.party, record.role) == (name, role):
                return record
    return None
