"""Settle on a version of the protocol at the start of each connection, or say clearly why not."""

from __future__ import annotations

__all__ = ["VERSIONS", "Hello", "Welcome", "greet", "listen_for", "refuse", "settle", "welcome"]

import os
import threading

from fedbio import __version__
from fedbio.errors import ProtocolError, RefusedError
from fedbio.transport.drivers.base import Connection, ConnectionClosed
from fedbio.transport.frames import Frame, Kind, make
from fedbio.transport.limits import Limits
from fedbio.transport.wire import Hello, Refusal, Welcome, pack, unpack

VERSIONS = (1,)
"""Versions of the protocol that this release speaks. HELLO, WELCOME and REFUSED stay as they are in all of them."""


def greet(connection: Connection, limits: Limits, instance: bytes, session: bytes | None) -> Welcome:
    """Say HELLO and return the server's WELCOME; the connection is ended if there is none.

    Parameters
    ----------
    instance : bytes
        This process.
    session : bytes or None
        The session to resume.

    Raises
    ------
    RefusedError
        If the server refuses for good, with its reason.
    ConnectionClosed
        If it refuses for now, or the connection ends.
    """
    address = connection.address
    hello = Hello(VERSIONS, __version__, instance, os.getpid(), limits.window_chunks, session)
    try:
        connection.write(make(Kind.HELLO, payload=pack(hello)))
        frame = _read_first(connection, limits.handshake_s)
        if frame.kind == Kind.REFUSED:
            refusal = unpack(frame.payload, Refusal)
            if refusal.final:
                raise RefusedError(f"server {address} refused: {refusal.reason}")
            raise ConnectionClosed(f"refused for now: {refusal.reason}")
        if frame.kind != Kind.WELCOME:
            raise ProtocolError(f"server {address} answered HELLO with a frame of kind {frame.kind}")
        welcome = unpack(frame.payload, Welcome)
        if welcome.version not in VERSIONS:
            raise RefusedError(f"server {address} chose protocol version {welcome.version}, not {_shown(VERSIONS)}")
        return welcome
    except BaseException:
        connection.abort()
        raise


def listen_for(connection: Connection, limits: Limits) -> Hello:
    """Wait for the dialling end's HELLO."""
    frame = _read_first(connection, limits.handshake_s)
    if frame.kind != Kind.HELLO:
        raise ProtocolError(f"the first frame is of kind {frame.kind}, expected HELLO")
    return unpack(frame.payload, Hello)


def settle(hello: Hello) -> int:
    """Return the highest version that both ends speak.

    Raises
    ------
    RefusedError
        If there is none.
    """
    common = set(VERSIONS) & set(hello.versions)
    if not common:
        raise RefusedError(
            f"fedbio {hello.release} speaks protocol version {_shown(hello.versions)}, the server's fedbio "
            f"{__version__} speaks {_shown(VERSIONS)}; install the same release at both ends"
        )
    return max(common)


def welcome(connection: Connection, version: int, limits: Limits, instance: bytes, session: bytes) -> None:
    """Let the dialling end in."""
    content = Welcome(version, __version__, connection.peer, limits.window_chunks, instance, session)
    connection.write(make(Kind.WELCOME, payload=pack(content)))


def refuse(connection: Connection, reason: str, *, final: bool = True) -> None:
    """Send the reason and end the connection."""
    connection.write(make(Kind.REFUSED, payload=pack(Refusal(reason[:1000], final))))
    connection.close()


def _read_first(connection: Connection, within_s: float) -> Frame:
    timer = threading.Timer(within_s, connection.abort)
    timer.daemon = True
    timer.start()
    try:
        return connection.read()
    finally:
        timer.cancel()


def _shown(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions))
