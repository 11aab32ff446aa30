"""Turn ``host:port`` into sockets."""

from __future__ import annotations

__all__ = ["bind", "connect", "split"]

import errno
import socket
import time

from fedbio.errors import MachineError

BACKLOG = 512
"""Connections that wait to be accepted: a crowd of silent ones does not keep others out."""

TRIES = 8
"""Ports that are tried when any port will do for a host of several addresses."""


def split(address: str) -> tuple[str, int]:
    """Return host and port; an IPv6 host stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def bind(address: str) -> tuple[list[socket.socket], int]:
    """Listen on every address that the host's name stands for, all with one port.

    Returns
    -------
    sockets : list of socket
    port : int
        The real one, also where port 0 was asked for.

    Raises
    ------
    MachineError
        If one of the addresses cannot be taken, with the reason.
    """
    host, port = split(address)
    tries = 1 if port else TRIES
    while True:
        tries -= 1
        sockets: list[socket.socket] = []
        taken = port
        try:
            for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                sockets.append(listening := socket.socket(family, kind))
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # [::] stands for all addresses of this machine, the short ones too
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
                listening.bind((place[0], taken, *place[2:]))
                listening.listen(BACKLOG)
                taken = listening.getsockname()[1]
            return sockets, taken
        except OSError as error:
            for listening in sockets:
                listening.close()
            if error.errno != errno.EADDRINUSE:
                raise MachineError(f"{address} cannot be listened on ({error.strerror}); check the address") from error
            if not tries:
                raise MachineError(
                    f"port {taken} is in use on this machine; stop what uses it (ss -ltnp shows it) or choose another"
                ) from error


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Dial each address of a host in turn; a silent one leaves time for those after it."""
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, _, _, place) in enumerate(places):
        dialling = socket.socket(family, kind)
        try:
            dialling.settimeout(max(0.05, (deadline - time.monotonic()) / (len(places) - number)))
            dialling.connect(place)
            return dialling
        except OSError:
            dialling.close()
            if number == len(places) - 1:
                raise
    raise OSError(f"host name {host!r} has no address")
