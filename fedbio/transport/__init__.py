"""Move messages and models between named peers: frames, drivers, streams, endpoints.

A server listens, sites dial out; both ends prove who they are with certificates, and a peer's name is what its
certificate says. Either end sends a message (a topic, a small body, and perhaps a payload of any size) to the other::

    server = ServerEndpoint("0.0.0.0:8443", credentials, spool=folder, on_message=handle, on_peer=announce)
    server.start()
    server.send("site-1", "task", b"...", TensorPayload(parameters))

Construct, then `start`: handlers may use the endpoint as soon as they are called.
"""

from __future__ import annotations

__all__ = [
    "BytesPayload",
    "Credentials",
    "FilePayload",
    "Limits",
    "Payload",
    "Received",
    "ReceivedPayload",
    "SendReceipt",
    "ServerEndpoint",
    "SiteEndpoint",
    "TensorPayload",
]

from fedbio.transport.credentials import Credentials
from fedbio.transport.limits import Limits
from fedbio.transport.payloads import BytesPayload, FilePayload, Payload, ReceivedPayload, TensorPayload
from fedbio.transport.server import ServerEndpoint
from fedbio.transport.site import SiteEndpoint
from fedbio.transport.streams import Received, SendReceipt
