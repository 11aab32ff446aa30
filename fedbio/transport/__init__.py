"""Move messages and models between named peers: frames, drivers, streams, endpoints.

A server listens, sites dial out; both ends prove who they are with certificates, and a peer's name is what its
certificate says. Either end sends a message (a topic, a small body, and perhaps a payload of any size) to the other::

    server = ServerEndpoint("0.0.0.0:8443", credentials, spool=folder, on_message=handle, on_peer=announce)
    server.start()
    server.send("site-1", "task", b"...", TensorPayload(parameters))

Construct, then `start`: handlers may use the endpoint as soon as they are called. A connection that breaks is dialled
again, and what was under way goes on where it was.
"""

from __future__ import annotations

__all__ = [
    "BlobPayload",
    "BytesPayload",
    "ConsumerSink",
    "Credentials",
    "FilePayload",
    "FileSink",
    "Limits",
    "MemorySink",
    "ObjectPayload",
    "ObjectSink",
    "Opening",
    "Payload",
    "Presence",
    "Progress",
    "Received",
    "ReceivedPayload",
    "SendReceipt",
    "ServerEndpoint",
    "Sink",
    "SiteEndpoint",
    "SpoolSink",
    "TensorPayload",
    "TensorSink",
    "Unencrypted",
]

from fedbio.transport.credentials import Credentials, Unencrypted
from fedbio.transport.endpoint import Presence
from fedbio.transport.limits import Limits
from fedbio.transport.metering import Progress
from fedbio.transport.outgoing import SendReceipt
from fedbio.transport.payloads import BlobPayload, BytesPayload, FilePayload, ObjectPayload, Payload, TensorPayload
from fedbio.transport.receiver import Received
from fedbio.transport.server import ServerEndpoint
from fedbio.transport.sinks import (
    ConsumerSink,
    FileSink,
    MemorySink,
    ObjectSink,
    Opening,
    ReceivedPayload,
    Sink,
    SpoolSink,
    TensorSink,
)
from fedbio.transport.site import SiteEndpoint
