"""Files that the server streams to a site: kept under a plain name, if they are what they are said to be."""

from __future__ import annotations

__all__ = ["keep_file"]

import logging
import re

from fedbio.errors import DataError, ProtocolError
from fedbio.federation.executor import SiteContext
from fedbio.federation.messages import FileHeader, unpack
from fedbio.files import sha256_file
from fedbio.transport import Received

log = logging.getLogger(__name__)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def keep_file(received: Received, context: SiteContext) -> None:
    """Keep a file, in the folder of those that belong to it.

    Raises
    ------
    ProtocolError
        If it has no plain name.
    DataError
        If its content is not what the server announced.
    """
    header = unpack(FileHeader, received.body)
    if not (_PLAIN_NAME.fullmatch(header.name) and _DIGEST.fullmatch(header.group)) or received.payload is None:
        raise ProtocolError(f"the server has sent a file under the name {header.name!r}; it is not kept")
    path = context.received(header.group) / header.name
    received.payload.save(path)
    found = sha256_file(path)
    context.events.write("file received", file=header.name, sha256=found, bytes=received.payload.size)
    if found != header.sha256:
        path.unlink()
        raise DataError(f"{header.name}: the server announced SHA-256 {header.sha256} and sent {found}; it is not kept")
    log.info("file received file=%s bytes=%d sha256=%.12s", header.name, received.payload.size, found)
