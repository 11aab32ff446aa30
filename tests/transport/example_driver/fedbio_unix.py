"""An example of a driver: frames over a Unix domain socket; who may open its file is trusted to say its own name."""

from __future__ import annotations

__all__ = ["UnixDriver"]

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from fedbio.errors import MachineError
from fedbio.transport import Limits
from fedbio.transport.credentials import Identity, Unencrypted
from fedbio.transport.drivers import Connection, ConnectionClosed, Driver, Lane, Listener, Outbox
from fedbio.transport.frames import HEADER_BYTES, Frame, assemble, header, payload_bytes


class _UnixConnection(Connection):
    def __init__(self, peer: str, address: str, link: socket.socket) -> None:
        super().__init__(peer, address)
        self._link = link
        self._arriving = link.makefile("rb")
        self._outbox = Outbox()
        self._over = threading.Event()
        threading.Thread(target=self._send, daemon=True).start()

    def _receive(self) -> list[Frame]:
        with contextlib.suppress(OSError, ValueError):
            if len(head := self._arriving.read(HEADER_BYTES)) == HEADER_BYTES:
                size = payload_bytes(head, self.allowed_bytes)  # before memory is taken
                if len(payload := self._arriving.read(size)) == size:
                    return [assemble(head, payload)]
        self._outbox.close("closed by the peer", drop=True)
        self._over.set()
        raise ConnectionClosed(self._outbox.reason)

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        self._outbox.put(frame, lane)

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while (frames := self._outbox.take()) is not None:
                for frame in frames:
                    self._link.sendall(header(frame))
                    self._link.sendall(frame.payload)
            self._link.shutdown(socket.SHUT_WR)
            self._over.wait(1.0)
        self.abort()
        self._arriving.close()
        self._link.close()

    def close(self) -> None:
        self._outbox.close("closed here", drop=False)

    def abort(self) -> None:
        self._outbox.close("closed here", drop=True)
        self._over.set()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)


class _UnixListener(Listener):
    def __init__(self, address: str) -> None:
        self.address = address
        self._connections: list[Connection] = []
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(address)
        except OSError as error:
            self._socket.close()
            raise MachineError(f"{address} is in use or cannot be made ({error.strerror})") from error
        self._socket.listen()

    def start(self, on_connection: Callable[[Connection], None]) -> None:
        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = self._socket.accept()
                    name = Unencrypted(link.recv(64).decode()).name
                    link.sendall(b"!")
                    self._connections.append(_UnixConnection(name, "this machine", link))
                    on_connection(self._connections[-1])

        threading.Thread(target=accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            Path(self.address).unlink()
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            connection.close()


class UnixDriver(Driver):
    def listen(self, address: str, credentials: Identity, limits: Limits) -> Listener:
        return _UnixListener(address)

    def dial(self, address: str, credentials: Identity, timeout_s: float) -> Connection:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(address)
            link.sendall(credentials.check().encode())
            link.recv(1)
        except OSError as error:
            link.close()
            raise ConnectionClosed(f"connection refused ({error.strerror})") from error
        return _UnixConnection("", address, link)
