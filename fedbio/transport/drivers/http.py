"""Move frames over a WebSocket with mutual TLS, for networks that let nothing but HTTP pass.

Frames that leave together make one binary message. The `websockets` package asks and answers the HTTP question. Its
messages would pass through several copies, and none of their bytes could be checked before all have arrived: they are
taken apart here.
"""

from __future__ import annotations

__all__ = ["HttpDriver"]

import base64
import collections
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from websockets.client import ClientProtocol
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from fedbio.errors import ProtocolError, SettingsError
from fedbio.transport.credentials import Credentials, Identity
from fedbio.transport.drivers.addresses import connect, split
from fedbio.transport.drivers.base import ConnectionClosed
from fedbio.transport.drivers.pipes import PIECE_BYTES, Pipe, SocketPipe, Window
from fedbio.transport.drivers.sockets import Greeting, SocketDriver

PATH = "/fedbio"

NAME = "Fedbio-Name"
"""The header in which the dialling end says its name where no certificate does."""

HEAD_BYTES = 16 << 10

CONTINUED, BINARY, CLOSE, PING, PONG = 0x0, 0x2, 0x8, 0x9, 0xA
LAST, MASKED, RESERVED = 0x80, 0x80, 0x70
"""Bits in the first two bytes of a WebSocket frame (RFC 6455, 5.2)."""


class _WebSocketPipe(Pipe):
    """The bytes inside the messages of a WebSocket; where one message ends and another begins means nothing here."""

    def __init__(self, window: Window, *, dialled: bool) -> None:
        self._window = window
        self._dialled = dialled  # who has dialled masks what it sends
        self._left = 0
        self._mask: _Mask | None = None
        self._pongs: collections.deque[memoryview] = collections.deque(maxlen=1)  # the last PING's is enough

    def receive(self, into: memoryview) -> int:
        while not self._left:
            if not self._begin():
                return 0
        into = into[: min(self._left, PIECE_BYTES)]
        count = self._window.some(into)
        if self._mask:
            self._mask.apply(into[:count], into[:count])
        self._left -= count
        return count

    def _begin(self) -> bool:
        """Read the beginning of the next message; False if there will be none."""
        read = self._window.exactly
        try:
            first, second = read(2)
            if first & RESERVED or bool(second & MASKED) == self._dialled:
                raise ProtocolError(f"no sound WebSocket frame begins with {first:02x} {second:02x}")
            size = second & ~MASKED
            if size > 125:
                size = int.from_bytes(read(2 if size == 126 else 8), "big")
            mask = None if self._dialled else _Mask(bytes(read(4)), size)
            kind = first & 0x0F
            if kind in (CONTINUED, BINARY):
                self._left, self._mask = size, mask
                return True
            if size > 125 or kind not in (CLOSE, PING, PONG):
                raise ProtocolError(f"WebSocket frame of kind {kind} and {size} bytes, expected binary ones")
            content = read(size)
        except EOFError:
            return False
        if kind == PING:
            if mask:
                mask.apply(content, content)
            self._pongs.append(content)  # leaves with what is sent next; our own PING sees that this is soon
        return kind != CLOSE

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        while self._pongs:
            self._send(PONG, [self._pongs.popleft()])
        self._send(BINARY, buffers)

    def _send(self, kind: int, buffers: Sequence[bytes | memoryview]) -> None:
        size = sum(len(buffer) for buffer in buffers)
        masked = MASKED if self._dialled else 0
        if size <= 125:
            head = bytes([LAST | kind, masked | size])
        elif size < 1 << 16:
            head = bytes([LAST | kind, masked | 126]) + size.to_bytes(2, "big")
        else:
            head = bytes([LAST | kind, masked | 127]) + size.to_bytes(8, "big")
        if masked:
            key = os.urandom(4)
            mask = _Mask(key, size)
            hidden = np.empty(size, np.uint8).data
            at = 0
            for buffer in buffers:
                mask.apply(memoryview(buffer), hidden[at : at + len(buffer)])
                at += len(buffer)
            head, buffers = head + key, [hidden]
        self._window.pipe.send([head, *buffers])

    def trust(self) -> None:
        self._window.pipe.trust()

    def finish(self) -> None:
        self._send(CLOSE, [(1000).to_bytes(2, "big")])
        self._window.pipe.finish()

    def cut(self) -> None:
        self._window.pipe.cut()

    def close(self) -> None:
        self._window.pipe.close()


class _Mask:
    """The four bytes over and over that are laid on a message on its way to a server."""

    def __init__(self, key: bytes, size: int) -> None:
        self._pattern = np.tile(np.frombuffer(key, np.uint8), min(size, PIECE_BYTES) // 4 + 2)
        self._at = 0

    def apply(self, source: memoryview, target: memoryview) -> None:
        """Put the next bytes with the mask on them into the target, which may be the source."""
        given, into = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)
        for start in range(0, len(given), PIECE_BYTES):
            piece = slice(start, start + PIECE_BYTES)
            np.bitwise_xor(given[piece], self._pattern[self._at : self._at + len(given[piece])], out=into[piece])
        self._at = (self._at + len(given)) % 4


class _Upgrade(Greeting):
    alpn = "http/1.1"

    def ask(self, window: Window, address: str, name: str) -> Window:
        protocol = ClientProtocol(parse_uri(f"{'ws' if name else 'wss'}://{address}{PATH}"))
        request = protocol.connect()
        if name:
            request.headers[NAME] = name
        protocol.send_request(request)
        window.pipe.send(protocol.data_to_send())
        protocol.receive_data(window.until(b"\r\n\r\n", HEAD_BYTES, begin=b"HTTP/"))
        while protocol.state is State.CONNECTING and not protocol.handshake_exc:
            protocol.receive_data(bytes(window.exactly(1)))  # the text of a refusal
        if protocol.state is not State.OPEN:
            response: Any = getattr(protocol.handshake_exc, "response", None)
            text = response and (response.body or b"").decode("utf-8", "replace").strip()
            raise ConnectionClosed((text or str(protocol.handshake_exc))[:200])
        return Window(_WebSocketPipe(window, dialled=True))

    def hear(self, window: Window) -> str:
        self._protocol = ServerProtocol()
        self._protocol.receive_data(window.until(b"\r\n\r\n", HEAD_BYTES, begin=b"GET /"))
        events = self._protocol.events_received()
        if not events or not isinstance(events[0], Request):
            raise ProtocolError("it does not speak HTTP")
        self._request = events[0]
        return ",".join(self._request.headers.get_all(NAME))

    def answer(self, window: Window, refusal: str) -> Window:
        protocol = self._protocol
        if refusal:
            response = protocol.reject(503, refusal)
        elif self._request.path != PATH:
            response = protocol.reject(404, f"nothing here; fedbio is at {PATH}")
        else:
            response = protocol.accept(self._request)
        protocol.send_response(response)
        window.pipe.send(protocol.data_to_send())
        if protocol.state is not State.OPEN and not refusal:
            raise ProtocolError(f"it asked for no WebSocket at {PATH}")
        return Window(_WebSocketPipe(window, dialled=False))


class HttpDriver(SocketDriver):
    """WebSocket: for networks that let nothing but HTTP out, also through the proxy that the environment names."""

    greeting = _Upgrade

    def _connect(self, address: str, credentials: Identity, deadline: float) -> socket.socket:
        scheme = "https" if isinstance(credentials, Credentials) else "http"
        proxy = urllib.request.getproxies().get(scheme)
        if not proxy or urllib.request.proxy_bypass(split(address)[0]):
            return super()._connect(address, credentials, deadline)
        place = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        if place.scheme not in ("", "http") or not place.hostname:
            raise SettingsError(f"{scheme}_proxy: expected http://HOST:PORT, found {proxy!r}")
        shown = f"proxy {place.hostname}:{place.port or 80}"
        question = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n"
        if place.username:
            login = f"{urllib.parse.unquote(place.username)}:{urllib.parse.unquote(place.password or '')}"
            question += f"Proxy-Authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n"
        link = None
        try:
            link = connect(place.hostname, place.port or 80, deadline)
            window = Window(SocketPipe(link, deadline))
            window.pipe.send([f"{question}\r\n".encode()])
            status = window.until(b"\r\n\r\n", HEAD_BYTES).split(b"\r\n")[0].decode("ascii", "replace")
            if status.split(" ")[1:2] != ["200"]:
                raise OSError(f"it answered {status!r}")
            return link
        except (OSError, EOFError) as error:
            if link:
                link.close()
            reason = getattr(error, "strerror", None) or str(error) or "it hung up"
            raise ConnectionClosed(f"{shown}: {reason.lower()}") from error
