"""The way to the server that all sites of one process of a simulation's pool share."""

from __future__ import annotations

__all__ = ["Link", "Post"]

import itertools
import logging
import queue
import threading
import time
import weakref
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from fedbio.errors import FedbioError, PeerUnreachable, TransportError
from fedbio.federation import messages
from fedbio.federation.pool_messages import Letter, Mail, Orders, Taken
from fedbio.federation.pool_payloads import lay_out, mapped, poured, remove
from fedbio.federation.site import Site
from fedbio.transport import MemorySink, Opening, Payload, Received, ReceivedPayload, TensorSink

log = logging.getLogger(__name__)

SERVER = "server"
"""Who all messages are from."""

POURED = (messages.MEAN, messages.SPLIT)
"""Topics whose payloads a site takes into sinks of its own."""


class Post:
    """Sends what sites have for the server, and opens what it has for them."""

    def __init__(self, connection: Connection, orders: Orders) -> None:
        self._connection, self._orders = connection, orders
        self._writing = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[str]] = {}
        self._open: weakref.WeakValueDictionary[str, ReceivedPayload] = weakref.WeakValueDictionary()

    def send(self, site: str, topic: str, body: bytes, payload: Payload | None) -> None:
        """Send a site's message; with a payload, wait until the server has taken it."""
        if payload is None:
            return self.tell(Letter(site, topic, body))
        path = lay_out(payload, self._orders.folders, self._orders.prefix)
        number = next(self._numbers)
        answer = self._waiting[number] = queue.SimpleQueue()
        self.tell(Letter(site, topic, body, payload.kind, path, Path(path).stat().st_size, number))
        if refusal := answer.get():
            raise TransportError(refusal)
        return None

    def tell(self, message: Mail) -> None:
        """Send a message of this process's own."""
        try:
            with self._writing:
                self._connection.send_bytes(msgspec.msgpack.encode(message))
        except OSError as error:
            raise PeerUnreachable(f"the server has gone: {error}") from error

    def taken(self, taken: Taken) -> None:
        """Hear what became of a letter."""
        self._waiting.pop(taken.number).put(taken.refusal)

    def received(self, letter: Letter) -> Received:
        """Return a letter as a site hears it; of a payload for many there is one copy.

        Of one that a site pours into a sink of its own the bytes are there, read-only.
        """
        if letter.topic in POURED:
            content = mapped(letter)
            if letter.once:
                remove(letter.path)
            return Received(SERVER, letter.topic, letter.body, content)
        payload = self._open.get(letter.path)
        if payload is None and letter.kind:
            payload = ReceivedPayload(mapped(letter))
            if letter.kind == "quantized":
                payload = poured(payload.content, TensorSink(MemorySink, self._orders.quantization))
            self._open[letter.path] = payload
        return Received(SERVER, letter.topic, letter.body, payload)

    def hand_over(self, letter: Letter, received: Received, site: Site) -> None:
        """Have a site hear a letter, and tell the server if it wants to know."""
        refusal = ""
        try:
            if letter.topic in POURED:
                opening = Opening(SERVER, letter.topic, letter.body, letter.kind, letter.size)
                received = replace(received, payload=poured(received.payload, site.sinks[letter.topic](opening)))
            site.hear(received)
        except FedbioError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"cannot be stored: {error.strerror}"
        if refusal:
            log.warning("message not taken topic=%s reason=%s", letter.topic, refusal)
        self.acknowledge(letter, refusal)

    def acknowledge(self, letter: Letter, refusal: str = "") -> None:
        """Tell the server what became of a letter, if it wants to know."""
        if letter.number:
            self.tell(Taken(letter.number, refusal))


class Link:
    """One site's way to the server."""

    def __init__(self, site: str, post: Post) -> None:
        self._site, self._post = site, post

    def send(
        self, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> None:
        self._post.send(self._site, topic, body, payload)

    def wait(self, timeout_s: float | None = None) -> bool:
        time.sleep(timeout_s or 0.0)
        return False
