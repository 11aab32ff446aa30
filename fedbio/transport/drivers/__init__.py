"""The ways to move frames, by name; nothing above this room knows which one is in use."""

from __future__ import annotations

__all__ = ["Connection", "ConnectionClosed", "Driver", "Lane", "Listener", "load"]

import importlib

from fedbio.errors import SettingsError
from fedbio.transport.drivers.base import Connection, ConnectionClosed, Driver, Lane, Listener

DRIVERS = {"grpc": "fedbio.transport.drivers.grpc:GrpcDriver", "memory": "fedbio.transport.drivers.memory:MemoryDriver"}


def load(name: str) -> Driver:
    """Return the driver of that name; its libraries are imported now and not before."""
    if name not in DRIVERS:
        raise SettingsError(f"driver: expected one of {', '.join(DRIVERS)}, found {name!r}")
    module, _, attribute = DRIVERS[name].partition(":")
    driver: Driver = getattr(importlib.import_module(module), attribute)()
    return driver
