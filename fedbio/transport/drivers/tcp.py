"""Move frames over TCP, one after another as they are, with mutual TLS.

Before its first frame the dialling end sends one line, ``fedbio NAME`` with the name left out where a certificate
says it; the listening end answers ``welcome``, or the reason why not.
"""

from __future__ import annotations

__all__ = ["Line", "TcpDriver"]

from fedbio.transport.drivers.base import ConnectionClosed
from fedbio.transport.drivers.pipes import Window
from fedbio.transport.drivers.sockets import Greeting, SocketDriver

LINE_BYTES = 256


class Line(Greeting):
    """One line each way."""

    alpn = "fedbio"

    def ask(self, window: Window, address: str, name: str) -> Window:
        window.pipe.send([f"fedbio {name}\n".encode()])
        answer = window.until(b"\n", LINE_BYTES).decode("ascii", "replace").strip()
        if answer != "welcome":
            raise ConnectionClosed(answer)
        return window

    def hear(self, window: Window) -> str:
        return window.until(b"\n", LINE_BYTES, begin=b"fedbio ")[7:-1].decode("ascii", "replace")

    def answer(self, window: Window, refusal: str) -> Window:
        window.pipe.send([f"{refusal or 'welcome'}\n".encode()])
        return window


class TcpDriver(SocketDriver):
    """TCP: the fastest, for links on which nothing but a port stands between the two ends."""

    greeting = Line
