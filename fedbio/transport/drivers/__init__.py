"""The ways to move frames, by name; nothing above this room knows which one is in use."""

from __future__ import annotations

__all__ = ["HANDSHAKE_BYTES", "Connection", "ConnectionClosed", "Driver", "Lane", "Listener", "Outbox", "load"]

import importlib
import importlib.metadata

from fedbio.errors import SettingsError
from fedbio.transport.drivers.base import HANDSHAKE_BYTES, Connection, ConnectionClosed, Driver, Lane, Listener
from fedbio.transport.drivers.outbox import Outbox

BUILT_IN = {
    "grpc": "fedbio.transport.drivers.grpc:GrpcDriver",
    "tcp": "fedbio.transport.drivers.tcp:TcpDriver",
    "http": "fedbio.transport.drivers.http:HttpDriver",
    "memory": "fedbio.transport.drivers.memory:MemoryDriver",
    "local": "fedbio.transport.drivers.unix:UnixDriver",
}

GROUP = "fedbio.drivers"
"""The entry points under which an installed package offers a driver: a name, and a class without parameters."""


def load(name: str) -> Driver:
    """Return the driver of that name; its libraries are imported now and not before."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return _made(getattr(importlib.import_module(module), attribute))
    offered = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in offered:
        raise SettingsError(f"driver: expected one of {', '.join([*BUILT_IN, *sorted(offered)])}, found {name!r}")
    return _made(offered[name].load())


def _made(kind: type[Driver]) -> Driver:
    return kind()
