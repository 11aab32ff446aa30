"""A site's end of split sessions: send a message to the other site, wait for its answer."""

from __future__ import annotations

__all__ = ["Channel", "SplitSite"]

import collections
import threading
import time
from collections.abc import Callable

from fedbio.errors import FederationError, ProtocolError
from fedbio.federation import messages
from fedbio.federation.messages import Ended, Passage, pack, unpack
from fedbio.federation.model import Parameters
from fedbio.federation.split_items import ItemsSink
from fedbio.transport import Opening, Received

MAX_MESSAGE_BYTES = 1 << 30
"""The most that a site takes in one message, whatever the server's job says."""

MAX_BOXES = 4
"""Sessions whose messages are kept: one may come before the task that it is for."""

LOOK_EVERY_S = 1.0
"""Seconds between two looks at whether the server is still there."""


class _Box:
    """What has come for a session."""

    def __init__(self) -> None:
        self.number = -1
        self.items: Parameters | None = None
        self.ended = ""
        self.open = False


class SplitSite:
    """Register `sink` for the topic `messages.SPLIT`, and pass it the messages that arrive.

    Parameters
    ----------
    send : callable
        Sends a body and tensors to the server, as `messages.SPLIT`; raises `TransportError`.
    check : callable
        Raises a `FedbioError` if the server was lost for good.
    """

    def __init__(self, send: Callable[[bytes, Parameters], None], check: Callable[[], object]) -> None:
        self._send, self._check = send, check
        self._boxes: collections.OrderedDict[str, _Box] = collections.OrderedDict()
        self._changed = threading.Condition()

    def sink(self, opening: Opening) -> ItemsSink:
        """Return where a message goes while it arrives."""
        unpack(Passage, opening.body)
        return ItemsSink(MAX_MESSAGE_BYTES)

    def take(self, received: Received) -> None:
        """Keep a message until it is asked for."""
        if received.topic == messages.SPLIT_END:
            end = unpack(Ended, received.body)
            with self._changed:
                self._box(end.session).ended = end.reason or "the server has ended it"
                self._changed.notify_all()
            return
        passage = unpack(Passage, received.body)
        if not isinstance(received.payload, dict):
            raise ProtocolError("a message of a split session came without tensors")
        with self._changed:
            box = self._box(passage.session)
            # sites take turns: there is one at a time
            box.number, box.items = passage.number, received.payload
            self._changed.notify_all()

    def broken(self, reason: str) -> None:
        """End all sessions: this server knows nothing of them any more, or wants nothing of them."""
        with self._changed:
            for box in self._boxes.values():
                box.ended = box.ended or reason
            self._changed.notify_all()

    def channel(self, session: str) -> Channel:
        """Return this site's end of a session."""
        with self._changed:
            self._box(session).open = True
        return Channel(self, session)

    def _box(self, session: str) -> _Box:
        if session not in self._boxes:
            self._boxes[session] = _Box()
            closed = [name for name, box in self._boxes.items() if not box.open]
            for name in closed[: max(0, len(closed) - MAX_BOXES)]:
                del self._boxes[name]
        return self._boxes[session]

    def _pass(self, session: str, number: int, items: Parameters) -> None:
        with self._changed:
            self._raise_if_over(session)
        self._send(pack(Passage(session, number)), items)

    def _await(self, session: str, number: int) -> Parameters:
        looked = time.monotonic()
        while True:
            with self._changed:
                box = self._box(session)
                if box.items is not None and box.number == number:
                    items, box.items = box.items, None
                    return items
                self._raise_if_over(session)
                self._changed.wait(LOOK_EVERY_S)
            if time.monotonic() - looked > LOOK_EVERY_S:
                looked = time.monotonic()
                self._check()

    def _raise_if_over(self, session: str) -> None:
        if reason := self._box(session).ended:
            raise FederationError(f"the exchange with the other site is over: {reason}")

    def _end(self, session: str, reason: str) -> None:
        with self._changed:
            if (box := self._boxes.get(session)) is not None:
                box.ended = box.ended or reason
                self._changed.notify_all()

    def _close(self, session: str) -> None:
        with self._changed:
            self._boxes.pop(session, None)


class Channel:
    """One session, as one of its sites sees it; a context manager.

    The sites take turns: one sends the messages of even numbers, the other those of odd ones.
    """

    def __init__(self, site: SplitSite, session: str) -> None:
        self._site, self._session = site, session

    def send(self, number: int, items: Parameters) -> None:
        """Send named tensors and wait until the server has them; they must not change meanwhile.

        Raises
        ------
        FederationError
            If the session is over; says why.
        TransportError
            If the server does not take the message, or is gone.
        """
        self._site._pass(self._session, number, items)

    def receive(self, number: int) -> Parameters:
        """Wait for the other site's message; its arrays are memory of their own.

        Raises
        ------
        FederationError
            If the session is over; says why.
        PeerUnreachable
            If the server was lost.
        """
        return self._site._await(self._session, number)

    def end(self, reason: str) -> None:
        """Have who waits here get an error; from any thread."""
        self._site._end(self._session, reason)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self._site._close(self._session)
