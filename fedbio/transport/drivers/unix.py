"""Move frames between processes of one machine, over a Unix domain socket; what is said is as over TCP.

An address is the path of the socket. Whoever may enter its folder may connect and say any name: keep it in a folder of
mode 0700, where that is nobody but the user who runs both ends.
"""

from __future__ import annotations

__all__ = ["UnixDriver"]

import contextlib
import errno
import socket
import time
from pathlib import Path

from fedbio.errors import MachineError, SettingsError
from fedbio.transport.credentials import Credentials, Identity
from fedbio.transport.drivers.addresses import BACKLOG
from fedbio.transport.drivers.base import Connection, Listener
from fedbio.transport.drivers.sockets import SocketDriver
from fedbio.transport.drivers.tcp import Line
from fedbio.transport.limits import Limits


class UnixDriver(SocketDriver):
    """Unix domain sockets, for the two ends of a connection that never leaves a machine."""

    greeting = Line

    def listen(self, address: str, credentials: Identity, limits: Limits) -> Listener:
        _check(credentials)
        return super().listen(address, credentials, limits)

    def dial(self, address: str, credentials: Identity, timeout_s: float) -> Connection:
        _check(credentials)
        return super().dial(address, credentials, timeout_s)

    def _bind(self, address: str) -> tuple[list[socket.socket], str]:
        listening = socket.socket(socket.AF_UNIX)
        try:
            _remove_stale(address)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRINUSE:
                raise MachineError(f"{address} is in use by another process; choose another path") from error
            raise MachineError(
                f"{address} cannot be listened on ({error.strerror or error}); take a short one on this machine's disk"
            ) from error
        return [listening], address

    def _connect(self, address: str, credentials: Identity, deadline: float) -> socket.socket:
        dialling = socket.socket(socket.AF_UNIX)
        try:
            dialling.settimeout(max(0.05, deadline - time.monotonic()))
            dialling.connect(address)
        except FileNotFoundError as error:
            dialling.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused: no such socket") from error
        except OSError:
            dialling.close()
            raise
        return dialling


def _check(credentials: Identity) -> None:
    if isinstance(credentials, Credentials):
        raise SettingsError("driver: local connects processes of one machine and takes no certificates; choose another")


def _remove_stale(address: str) -> None:
    """Remove the socket of a listener that is gone: closing one leaves its file behind."""
    if Path(address).is_socket():
        with socket.socket(socket.AF_UNIX) as asking, contextlib.suppress(ConnectionRefusedError):
            asking.settimeout(1.0)
            asking.connect(address)
            return
        Path(address).unlink()
