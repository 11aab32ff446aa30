"""What travels beside a message: bytes, a file or tensors on the way out, memory or a spool file on the way in."""

from __future__ import annotations

__all__ = ["BytesPayload", "FilePayload", "Payload", "ReceivedPayload", "Spool", "TensorPayload"]

import contextlib
import mmap
import os
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from fedbio import tensors as layout
from fedbio.errors import DataError
from fedbio.files import whole_file

CHUNK_BYTES = 1 << 20


class Payload(ABC):
    """Something of known size that can be read in chunks, again for each receiver.

    Attributes
    ----------
    size : int
        Bytes in all.
    """

    size: int

    def __init__(self, size: int) -> None:
        self.size = size
        self._digest: bytes | None = None
        self._computing = threading.Lock()

    @abstractmethod
    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 1 MiB."""

    def digest(self) -> bytes:
        """Return the BLAKE3 digest, computed once; call it before sending one payload to many."""
        with self._computing:
            if self._digest is None:
                for _ in self.digested_chunks():
                    pass
        assert self._digest is not None
        return self._digest

    def digested_chunks(self) -> Iterator[memoryview]:
        """Yield the chunks and leave the digest behind, unless it is known already."""
        if self._digest is not None:
            yield from self.chunks()
            return
        hasher = blake3()
        for chunk in self.chunks():
            hasher.update(chunk)
            yield chunk
        self._digest = hasher.digest()


class BytesPayload(Payload):
    """A buffer in memory, passed on without a copy."""

    def __init__(self, content: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(content).cast("B")
        super().__init__(len(self._view))

    def chunks(self) -> Iterator[memoryview]:
        for begin in range(0, self.size, CHUNK_BYTES):
            yield self._view[begin : begin + CHUNK_BYTES]


class TensorPayload(Payload):
    """Named arrays in the safetensors layout; they must not change until they are sent."""

    def __init__(self, parameters: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._parameters = dict(parameters)
        super().__init__(layout.encoded_size(self._parameters))

    def chunks(self) -> Iterator[memoryview]:
        return layout.chunks(self._parameters, CHUNK_BYTES)


class FilePayload(Payload):
    """A file, read chunk by chunk; it must not change until it is sent."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        super().__init__(self.path.stat().st_size)

    def chunks(self) -> Iterator[memoryview]:
        with open(self.path, "rb", buffering=0) as file:
            left = self.size
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise DataError(f"{self.path}: {left} bytes shorter than when sending began; send it again")
                yield memoryview(chunk)
                left -= len(chunk)


class ReceivedPayload:
    """A payload that has arrived whole and was checked; memory or disk is given back with the object.

    Attributes
    ----------
    size : int
        Bytes in all.
    """

    def __init__(self, content: memoryview, spool: Spool | None = None) -> None:
        self.size = len(content)
        self._content = content
        self._spool = spool

    @property
    def content(self) -> memoryview:
        """The bytes, read-only."""
        return self._content

    def tensors(self, limits: layout.TensorLimits | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Return named arrays over the payload, without a copy; raise `FormatError` if it is malformed."""
        return layout.parse(self._content, limits=limits)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the payload to `path`, whole or not at all; a spooled one on the same disk is moved, not copied."""
        with whole_file(path) as beside:
            if self._spool is None or not self._spool.link(beside):
                with open(beside, "wb") as file:
                    for begin in range(0, self.size, CHUNK_BYTES):
                        file.write(self._content[begin : begin + CHUNK_BYTES])


class Spool:
    """A file without a name: what is not saved is gone with the process, whatever ends it.

    Raises
    ------
    OSError
        If the disk has no room for `size` bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = _open_nameless(folder)
        weakref.finalize(self, os.close, self._descriptor)
        os.posix_fallocate(self._descriptor, 0, size)

    def write(self, chunk: memoryview) -> None:
        """Append a chunk."""
        while len(chunk):
            chunk = chunk[os.write(self._descriptor, chunk) :]

    def map(self) -> memoryview:
        """Return the whole content, mapped read-only."""
        return memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ))

    def link(self, path: Path) -> bool:
        """Give the file a name, if its file system can."""
        with contextlib.suppress(OSError):
            os.link(f"/proc/self/fd/{self._descriptor}", path, follow_symlinks=True)
            return True
        return False


def _open_nameless(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    # a file system without nameless files: make one and take its name away
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".spool-")
    Path(name).unlink()
    return descriptor
