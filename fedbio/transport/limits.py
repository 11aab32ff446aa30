"""What an endpoint accepts from a peer and how long it waits, every limit with its unit."""

from __future__ import annotations

__all__ = ["MAX_BODY_BYTES", "Limits"]

from dataclasses import dataclass

MAX_BODY_BYTES = 768 << 10
"""The largest body of a message, which travels in one frame; what is larger travels as a payload."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an endpoint accepts; each is checked before memory or disk is taken."""

    max_peers: int = 256
    """Connections at a server."""
    max_handshakes: int = 64
    """Connections at a server that have not yet proven who they are; one more ends the oldest of them."""
    max_payload_bytes: int = 256 << 30
    """Bytes of one payload."""
    max_item_bytes: int = 16 << 30
    """Bytes of one tensor in an object stream."""
    memory_bytes: int = 64 << 20
    """Payload bytes of one peer held in memory; what exceeds them goes to a spool file."""
    max_messages: int = 64
    """Messages of one peer that are arriving or not yet handled."""
    max_partial_files: int = 8
    """Files of one peer that wait half-received for their rest."""
    keep_partial_s: float = 86_400.0
    """Seconds that a half-received file waits for its rest."""
    window_chunks: int = 8
    """Chunks of one stream that may be under way before the receiver has taken them in."""
    handshake_s: float = 10.0
    """Seconds from a connection to the end of its handshake."""
    idle_s: float = 120.0
    """Seconds without a chunk, on a connection that stands, after which a stream is given up."""
    resume_s: float = 120.0
    """Seconds that what is under way outlives a broken connection."""
    takeover_s: float = 2.0
    """Seconds that a peer has to show life when a second connection arrives under its name."""
