"""What an endpoint accepts from a peer, every limit with its unit."""

from __future__ import annotations

__all__ = ["MAX_BODY_BYTES", "Limits"]

from dataclasses import dataclass

MAX_BODY_BYTES = 1 << 20
"""The largest body of a message; what is larger travels as a payload."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an endpoint accepts; each is checked before memory or disk is taken."""

    max_peers: int = 256
    """Connections at a server."""
    max_payload_bytes: int = 64 << 30
    """Declared size of one payload."""
    memory_bytes: int = 64 << 20
    """Payload bytes of one peer held in memory; what exceeds them goes to a spool file."""
    max_messages: int = 64
    """Messages of one peer that are arriving or not yet handled."""
    window_chunks: int = 8
    """Chunks of one stream that may be under way before the receiver has taken them in."""
    handshake_s: float = 10.0
    """Seconds from a connection to the end of its handshake."""
    idle_s: float = 120.0
    """Seconds without a chunk after which a stream is given up."""
    takeover_s: float = 2.0
    """Seconds that a peer has to show life when a second connection arrives under its name."""
