"""Payloads between the processes of a simulation: each is a file of a private folder, mapped by those who get it."""

from __future__ import annotations

__all__ = ["Shelf", "lay_out", "make_folders", "mapped", "poured", "remove"]

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbio.errors import MachineError, ProtocolError
from fedbio.federation.pool_messages import Letter
from fedbio.transport import FilePayload, Payload, Sink
from fedbio.transport.objects import CHUNK_BYTES

MEMORY = "/dev/shm"  # noqa: S108 - a folder of the run's own in it, for nobody else to look into
"""The file system that is in memory."""


class Shelf:
    """The server's payloads: each is written once, however many sites it goes to, and removed when it is forgotten.

    Parameters
    ----------
    folders : sequence of str
        See `lay_out`.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._laid: weakref.WeakKeyDictionary[Payload, _Laid] = weakref.WeakKeyDictionary()

    def path(self, payload: Payload) -> str:
        """Return the file that a payload is in.

        Whoever asks first writes it. If that fails the others fail with it: what makes a payload's chunks on the way
        makes them once.
        """
        if isinstance(payload, FilePayload):
            return str(payload.path.absolute())
        with self._lock:
            laid = self._laid.setdefault(payload, _Laid())
        with laid.lock:
            if laid.failure is not None:
                raise laid.failure
            if not laid.path:
                try:
                    laid.path = lay_out(payload, self._folders, "server-")
                except BaseException as failure:
                    laid.failure = failure
                    raise
                weakref.finalize(payload, remove, laid.path)
        return laid.path


@dataclass(slots=True)
class _Laid:
    """Where a payload is, or why it is nowhere."""

    path: str = ""
    failure: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


def lay_out(payload: Payload, folders: Sequence[str], prefix: str) -> str:
    """Write a payload into a new file and return its path.

    Parameters
    ----------
    payload : Payload
    folders : sequence of str
        The first one with room for it is taken.
    prefix : str
        How the file's name begins.

    Raises
    ------
    MachineError
        If none of them has.
    """
    for folder in folders:
        descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for chunk in payload.chunks():
                    while len(chunk):
                        chunk = chunk[file.write(chunk) :]
        except OSError as error:
            Path(path).unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        except BaseException:
            Path(path).unlink()
            raise
        else:
            return path
    raise MachineError(f"{', '.join(folders)}: full; free some space and run the same command again")


def mapped(letter: Letter) -> memoryview:
    """Return the payload of a letter, read-only; it outlives its file.

    Raises
    ------
    ProtocolError
        If it is not there whole: its task is over.
    """
    if not letter.size:
        return memoryview(b"")
    try:
        with open(letter.path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ProtocolError(f"the payload of {letter.topic} is gone: {error}") from error
    if len(content) != letter.size:
        raise ProtocolError(f"the payload of {letter.topic} has {len(content)} bytes, {letter.size} were announced")
    return content


def poured(content: memoryview, sink: Sink) -> Any:
    """Return what a sink makes of a payload, which it gets as from a network, chunk by chunk."""
    try:
        for begin in range(0, len(content), CHUNK_BYTES):
            sink.write(content[begin : begin + CHUNK_BYTES])
        return sink.finish()
    except BaseException:
        sink.abort()
        raise


def remove(path: str) -> None:
    """Remove a payload's file, if there is one and it is still there."""
    if path:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()


def make_folders(folder: Path) -> list[str]:
    """Return private folders for payloads: in memory, if the machine has such a file system, then beside the logs."""
    found = []
    folder.mkdir(parents=True, exist_ok=True)
    # by a name of the run's own: one that was killed leaves its folder to the next
    name = f"fedbio-{os.getuid()}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}"
    for path in (Path(MEMORY, name), folder / "payloads"):
        # of somebody else's folder, or none at all, nothing comes but the next one
        with contextlib.suppress(OSError):
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(mode=0o700)
            found.append(str(path))
    return found
