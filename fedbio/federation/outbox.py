"""What leaves the server: every message and stream to a site, each counted in the ledger before it goes."""

from __future__ import annotations

__all__ = ["GOODBYE_S", "Outbox"]

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from fedbio.errors import TransportError
from fedbio.federation import messages
from fedbio.federation.ledger import Ledger
from fedbio.federation.links import ServerLink
from fedbio.federation.messages import FileHeader, pack
from fedbio.federation.model import Parameters
from fedbio.federation.quantization import scheme_of
from fedbio.transport import FilePayload, ObjectPayload, Payload
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

GOODBYE_S = 10.0
"""Seconds that a site has to take a word that needs no answer."""

COURIERS = 16
"""The most sites that are waited for at the same time, to be told something."""


class Outbox:
    """Sends to sites.

    Parameters
    ----------
    endpoint : ServerLink
    ledger : Ledger
        The server's account of what left it.
    deadline_s : float
        Seconds that a site has to take a task or a file.
    """

    def __init__(self, endpoint: ServerLink, ledger: Ledger, *, deadline_s: float) -> None:
        self._endpoint, self._ledger, self._deadline_s = endpoint, ledger, deadline_s
        self._couriers = Workers("tell", most=COURIERS)
        self._files: dict[str, list[Payload]] = {}
        """Those that are on their way, by job."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Wait for nobody any more."""
        self._couriers.close()

    def post_task(self, site: str, body: bytes, payload: Payload | None) -> None:
        """Send a task."""
        size = len(body) + ((payload.size or 0) if payload else 0)
        self._ledger.add("model" if payload else "control", size, to=site, scheme=scheme_of(payload))
        self._endpoint.send(site, messages.TASK, body, payload, self._deadline_s)

    def exchange(self, site: str, topic: str, body: bytes, payload: Payload | None, timeout_s: float | None) -> None:
        """Send a message of a lockstep exchange."""
        size = len(body) + ((payload.size or 0) if payload else 0)
        self._ledger.add("model" if payload else "control", size, to=site)
        self._endpoint.send(site, topic, body, payload, timeout_s)

    def pass_on(self, site: str, topic: str, body: bytes, items: Parameters | None) -> None:
        """Send what one site has for another."""
        size = len(body) + sum(each.nbytes for each in (items or {}).values())
        self._ledger.add("control" if items is None else "activations", size, to=site)
        payload = None if items is None else ObjectPayload(items)
        self._endpoint.send(site, topic, body, payload, self._deadline_s)

    def send_file(
        self, site: str, path: Path, header: FileHeader, kind: str, *, job: str, check: Callable[[], None]
    ) -> None:
        """Stream a file of a job; `kind` is what it is in the ledger, `check` raises if the job was interrupted.

        Raises
        ------
        TransportError
            If the site does not get it; at once if `interrupt` is called for the job.
        """
        payload = FilePayload(path)
        with self._under_way(job, payload):
            # one that is interrupted from here on finds the file
            check()
            self._ledger.add(kind, payload.size or 0, to=site)
            self._endpoint.send(site, messages.FILE, pack(header), payload, self._deadline_s)

    def interrupt(self, job: str) -> None:
        """End the files of a job that are under way: a large one would keep its controller for hours."""
        with self._lock:
            payloads = list(self._files.get(job, ()))
        for each in payloads:
            each.cancel()

    @contextlib.contextmanager
    def _under_way(self, job: str, payload: Payload) -> Iterator[None]:
        with self._lock:
            self._files.setdefault(job, []).append(payload)
        try:
            yield
        finally:
            with self._lock:
                self._files[job].remove(payload)

    def tell(self, site: str, topic: str, message: msgspec.Struct | None = None, timeout_s: float = GOODBYE_S) -> None:
        """Send a short message; a site that does not take it has to do without."""
        body = b"" if message is None else pack(message)
        self._ledger.add("control", len(body), to=site)
        try:
            self._endpoint.send(site, topic, body, None, timeout_s)
        except TransportError as error:
            log.info("not told site=%s topic=%s reason=%s", site, topic, error)

    def tell_later(self, site: str, topic: str, message: msgspec.Struct, timeout_s: float) -> None:
        """Send a short message to a site that is away, should it come back in time; return at once."""
        self._couriers.submit(functools.partial(self.tell, site, topic, message, timeout_s))
