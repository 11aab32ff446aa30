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
from fedbio.federation.ledger import Ledger
from fedbio.files import exclusive_lock, write_whole
from fedbio.results import EventLog, PartyRecord, read_party, utc_now, write_party

UNFINISHED = "unfinished.json"
"""The record of a run that has not come to its end, from which a restarted process goes on."""


class Party:
    """Keeps a party's record of one run, across restarts."""

    def __init__(self, workspace: Path, name: str, role: Literal["server", "site"]) -> None:
        self.workspace, self.name = workspace, name
        self.events = EventLog(workspace, name)
        path = workspace / UNFINISHED
        continued = path.exists()
        self.record = read_party(path) if continued else PartyRecord(name, role, started=utc_now())
        self.ledger = Ledger(self.record, self.events)
        if continued:
            self.ledger.recount(self.events.path, self.record.started)
        self.events.write("continued" if continued else "started", version=__version__)
        self._saving = threading.Lock()
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
        with self._saving:
            write_whole(self.workspace / UNFINISHED, msgspec.json.encode(self.record))

    def finish(self, libraries: Sequence[str]) -> None:
        """Write ``party.json``: the run has come to its end."""
        self.record.finished = utc_now()
        self.record.peak_memory_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.record.versions = {
            "fedbio": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        }
        self.events.write("finished")
        write_party(self.workspace, self.record)
        (self.workspace / UNFINISHED).unlink(missing_ok=True)
