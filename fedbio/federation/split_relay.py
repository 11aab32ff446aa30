"""The server's end of split sessions: what one of two sites sends is passed on to the other, message by message.

A session has two sites that take turns, a number of messages, and a most that one of them may hold. The relay takes
what is due and nothing else: message n comes from the first site if n is even and from the second if it is odd, so
that one message of a session is under way at a time, and one is in the server's memory.
"""

from __future__ import annotations

__all__ = ["SplitRelay"]

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from fedbio.errors import PeerUnreachable, ProtocolError, TransportError
from fedbio.federation import messages
from fedbio.federation.messages import Ended, Passage, pack, unpack
from fedbio.federation.model import Parameters
from fedbio.federation.split_items import ItemsSink
from fedbio.transport import Opening, Received
from fedbio.transport.workers import Workers

log = logging.getLogger(__name__)

Send = Callable[[str, str, bytes, Parameters | None], None]
"""Sends to a site: its name, topic, body, and tensors, which are one object stream."""


@dataclass(slots=True)
class _Session:
    parties: tuple[str, str]
    messages: int
    max_bytes: int
    due: int = 0
    arriving: bool = False
    """Whether the message that is due is on its way in: a second one with its number is not taken."""
    ended: str = ""
    lost: bool = False


class SplitRelay:
    """Register `sink` for the topic `messages.SPLIT`, pass it the messages that arrive, and tell it who is gone.

    Parameters
    ----------
    send : callable
        How to send to a site; raises `TransportError`.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        # both parties of a session are told that it is over while messages of others pass
        self._tellers = Workers("split-tell", most=4)

    # what a controller does

    def open(self, session: str, first: str, second: str, *, messages: int, max_bytes: int) -> None:
        """Let messages of a session pass.

        Parameters
        ----------
        session : str
            A name that was never used before.
        first, second : str
            The sites; `first` sends the messages of even numbers.
        messages : int
            How many there will be in all.
        max_bytes : int
            Bytes of the tensors of one of them.
        """
        with self._lock:
            self._sessions[session] = _Session((first, second), messages, max_bytes)

    def close(self, session: str) -> None:
        """Let no more messages of a session pass; sites that still wait for one are told."""
        with self._lock:
            over = self._sessions.pop(session, None)
        if over is not None and not over.ended and over.due < over.messages:
            self._tell(session, over.parties, "the server has ended this part of the training")

    def lost(self, session: str) -> str:
        """Return which connection ended a session, as a sentence; empty if none did."""
        with self._lock:
            found = self._sessions.get(session)
            return found.ended if found is not None and found.lost else ""

    # what the transport reports

    def sink(self, opening: Opening) -> ItemsSink:
        """Return where a message goes while it arrives; `ProtocolError` if it is not the one that is due."""
        passage = unpack(Passage, opening.body)
        with self._lock:
            session = self._session(passage, opening.peer)
            if session.arriving:
                raise ProtocolError(f"message {passage.number} of the session is on its way already")
            session.arriving = True
        what = f"message {passage.number} of {opening.peer} was not taken"
        return ItemsSink(
            session.max_bytes,
            lambda problem: self._end(passage.session, f"{what}: {problem}"),
            # half a message is the first that is seen of a process that was killed
            lambda: self._end(passage.session, f"{opening.peer} is gone", lost=True),
        )

    def take(self, received: Received) -> None:
        """Pass a message on, on the thread that brings it."""
        try:
            passage, items = unpack(Passage, received.body), received.payload
            receiver = self._advance(passage, received.peer, complete=isinstance(items, dict))
        except ProtocolError as error:
            log.warning("message of a split session refused site=%s reason=%s", received.peer, error)
            return
        try:
            self._send(receiver, messages.SPLIT, pack(passage), items)
        except PeerUnreachable as error:
            log.info("message of a split session not delivered site=%s reason=%s", receiver, error)
            self._end(passage.session, f"{receiver} is gone", lost=True)
        except TransportError as error:
            self._end(passage.session, f"{receiver} has not taken message {passage.number}: {error}")

    def gone(self, site: str) -> None:
        """A site's process is gone: its sessions are over."""
        with self._lock:
            sessions = [name for name, each in self._sessions.items() if site in each.parties]
        for name in sessions:
            self._end(name, f"{site} is gone", lost=True)

    def _advance(self, passage: Passage, sender: str, *, complete: bool) -> str:
        """Note that a message has come and return who gets it; the next one is due before it is passed on.

        The answer to it may be here before the receiver's acknowledgement.
        """
        with self._lock:
            session = self._session(passage, sender)
            if not session.arriving or not complete:
                raise ProtocolError(f"message {passage.number} of the session came without tensors")
            session.due += 1
            session.arriving = False
            return session.parties[session.due % 2]

    def _session(self, passage: Passage, sender: str) -> _Session:
        """Return the session of a message, if it is the one that is due."""
        session = self._sessions.get(passage.session)
        if session is None or sender not in session.parties:
            raise ProtocolError(f"{sender} takes part in no such split session; it may be over")
        if session.ended:
            raise ProtocolError(f"the split session is over: {session.ended}")
        if passage.number >= session.messages:
            raise ProtocolError(f"message {passage.number} of a session of {session.messages} messages")
        if passage.number != session.due or session.parties[session.due % 2] != sender:
            raise ProtocolError(
                f"message {passage.number} of {sender}; message {session.due} of "
                f"{session.parties[session.due % 2]} is due"
            )
        return session

    def _end(self, name: str, reason: str, *, lost: bool = False) -> None:
        with self._lock:
            session = self._sessions.get(name)
            if session is None or session.ended:
                return
            session.ended, session.lost = reason, lost
        log.warning("split session over sites=%s reason=%s", ",".join(session.parties), reason)
        self._tell(name, session.parties, reason)

    def _tell(self, name: str, parties: tuple[str, str], reason: str) -> None:
        body = pack(Ended(name, reason[:500]))

        def tell(site: str) -> None:
            try:
                self._send(site, messages.SPLIT_END, body, None)
            except TransportError as error:
                log.info("not told site=%s topic=%s reason=%s", site, messages.SPLIT_END, error)

        for each in parties:
            self._tellers.submit(lambda site=each: tell(site))  # type: ignore[misc]
