"""What the run times ask of whatever brings their messages to the other side, over a network or not."""

from __future__ import annotations

__all__ = ["ServerLink", "SiteLink"]

from types import TracebackType
from typing import Any, Protocol, Self

from fedbio.transport import Payload


class SiteLink(Protocol):
    """A site's way to its server; `fedbio.transport.SiteEndpoint` is one."""

    def send(
        self, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> Any:
        """Send a message and wait until the server has the whole; raise `TransportError` if it has not."""

    def wait(self, timeout_s: float | None = None) -> Any:
        """Wait a while; raise what ended the link for good, if something has."""


class ServerLink(Protocol):
    """A server's ways to its sites; `fedbio.transport.ServerEndpoint` is one."""

    address: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def peers(self) -> tuple[str, ...]:
        """Return the names of the sites that are there, sorted."""

    def send(
        self, peer: str, topic: str, body: bytes = b"", payload: Payload | None = None, timeout_s: float | None = None
    ) -> Any:
        """Send a message and wait until the site has the whole; raise `TransportError` if it has not."""
