"""Account for every byte that leaves a party, by kind: in its record, and as a line of its event log."""

from __future__ import annotations

__all__ = ["Ledger"]

import threading
from pathlib import Path

import msgspec

from fedbio.results import EventLog, PartyRecord, Traffic

SENT = "sent"
"""The event of something leaving."""


class _Sent(msgspec.Struct):
    time: str = ""
    event: str = ""
    kind: str = ""
    bytes: int = 0
    messages: int = 0


class Ledger:
    """Adds what leaves to a party's record. Safe to use from several threads."""

    def __init__(self, record: PartyRecord, events: EventLog) -> None:
        self._record, self._events = record, events
        self._lock = threading.Lock()

    def add(self, kind: str, size: int, *, messages: int = 1, scheme: str | None = None, **details: str) -> None:
        """Note that so many bytes of a kind are about to leave; before they do, so that nothing leaves unnoted.

        They are those that travel: of a quantized model, with its `scheme`, the quantized ones.
        """
        with self._lock:
            self._count(kind, size, messages)
        if scheme is not None:
            details["scheme"] = scheme
        self._events.write(SENT, kind=kind, bytes=size, messages=messages, **details)

    def recount(self, events: Path, since: str) -> None:
        """Count again what left from a time on, from the event log: after a kill the record lags behind it."""
        self._record.sent.clear()
        for line in events.read_bytes().splitlines():
            try:
                entry = msgspec.json.decode(line, type=_Sent)
            except msgspec.MsgspecError:
                # the last line of a killed process may be cut off
                continue
            if entry.event == SENT and entry.time >= since:
                self._count(entry.kind, entry.bytes, entry.messages)

    def _count(self, kind: str, size: int, messages: int) -> None:
        traffic = self._record.sent.setdefault(kind, Traffic())
        traffic.messages += messages
        traffic.bytes += size
