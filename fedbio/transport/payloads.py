"""What travels beside a message, on its way out: the four kinds of stream, and models.

=================  ==========  ===============================================================================
payload            kind        what
=================  ==========  ===============================================================================
`BytesPayload`     bytes       pieces from any iterable; how many is not known beforehand
`BlobPayload`      blob        a buffer in memory
`FilePayload`      file        a file; goes on where it was, also after both processes were killed
`ObjectPayload`    object      a dict, a list, or any iterator of named tensors, item by item
`TensorPayload`    tensors     a model whose tensors are known beforehand, in the safetensors layout
=================  ==========  ===============================================================================
"""

from __future__ import annotations

__all__ = [
    "BlobPayload",
    "BytesPayload",
    "Chunk",
    "FilePayload",
    "ObjectPayload",
    "Payload",
    "TensorPayload",
]

import contextlib
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from blake3 import blake3
from isal.isal_zlib import crc32

from fedbio import tensors as layout
from fedbio.errors import DataError
from fedbio.transport.objects import CHUNK_BYTES, Item, object_chunks
from fedbio.transport.sharing import Chunk, SharedChunks
from fedbio.transport.wire import StreamKind


class Payload(ABC):
    """Something that is sent in chunks of at most 1 MiB.

    One payload may be sent to many peers at once: they share the work of making, summing and hashing its chunks.

    Attributes
    ----------
    kind : str
        See the table at the top.
    size : int or None
        Bytes in all; None if they are not known beforehand.
    waits : bool
        Whether a chunk may take its time, as one from a disk or another's code does. One that does not is made by the
        thread that sends it, if the driver has such; other messages of that connection leave after it.
    """

    kind: StreamKind
    waits = True

    def __init__(self, size: int | None) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._shared: SharedChunks | None = None
        self._digest: bytes | None = None
        self._cancelled = False
        self._watchers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """End every `send` of this payload that is under way, or is still to come, with a `TransportError`."""
        with self._lock:
            self._cancelled = True
            watchers = list(self._watchers)
        for each in watchers:
            each()

    @contextlib.contextmanager
    def watched(self, cancelled: Callable[[], None]) -> Iterator[None]:
        """Have `cancelled` called, on any thread, if the payload is cancelled meanwhile or was so before."""
        with self._lock:
            self._watchers.append(cancelled)
            late = self._cancelled
        if late:
            cancelled()
        try:
            yield
        finally:
            with self._lock:
                self._watchers.remove(cancelled)

    @abstractmethod
    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 1 MiB, from piece `start` on; a piece never changes once yielded."""

    def transfer(self) -> bytes | None:
        """Return what the payload is known by in any process, or None if it cannot go on in another one."""
        return None

    def read(self) -> Reader:
        """Return the chunks from the first one on."""
        with self._lock:
            shared = self._shared
            number = shared.join() if shared else None
            if shared is None or number is None:
                shared = self._shared = self._share()
                number = shared.join()
            assert number is not None
            return Reader(self, shared, number)

    def forgo(self) -> None:
        """One of those who would have read it will not come; the others need not wait."""
        with self._lock:
            if self._shared is None:
                self._shared = self._share()
            self._shared.leave(0)

    def digest(self) -> bytes:
        """Return the BLAKE3 digest of the whole; chunks are read for it if they were not yet."""
        if self._digest is None:
            with self.read() as reader:
                self._digest = reader.finish()
        return self._digest

    def known_digest(self) -> bytes | None:
        """Return the BLAKE3 digest of the whole if it was computed already, by whoever has read it to its end."""
        if self._digest is not None:
            return self._digest
        return self._shared.digest if self._shared else None

    def _share(self) -> SharedChunks:
        return SharedChunks(self.chunks())


class Reader:
    """One reading of a payload's chunks, together with others as long as they are equally fast."""

    def __init__(self, payload: Payload, shared: SharedChunks, number: int) -> None:
        self._payload = payload
        self._shared = shared
        self._number: int | None = number
        self._own: Iterator[memoryview] = iter(())
        self._hasher: blake3 | None = None
        self.position = 0
        """Number of the next chunk."""
        self.bytes = 0
        """Bytes of the chunks before it."""
        self.skipped = 0
        """Those of them that the receiver had from earlier."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := self._get()) is not None:
            self.position += 1
            self.bytes += len(chunk.view)
            yield chunk

    def resume(self, start: int, prefix: bytes) -> bool:
        """Go on at chunk `start` if the chunks before it have the digest `prefix`; return whether they have."""
        hasher = blake3()
        for chunk in itertools.islice(self._payload.chunks(), start):
            hasher.update(chunk)
        if hasher.digest() != prefix:
            return False
        self._leave()
        self._own, self._hasher = self._payload.chunks(start), hasher
        self.position, self.bytes = start, start * CHUNK_BYTES
        self.skipped = self.bytes
        return True

    def finish(self) -> bytes:
        """Read what is left and return the digest of the whole."""
        for _ in self:
            pass
        if self._hasher is not None:
            return self._hasher.digest()
        return self._shared.digest or self._payload.digest()

    def _get(self) -> Chunk | None:
        if self._number is not None:
            try:
                return self._shared.get(self._number)
            except LookupError:
                # slower than the others: the rest is read for this peer alone, and hashed by them
                self._number, self._own = None, self._payload.chunks(self.position)
        view = next(self._own, None)
        if view is None:
            return None
        if self._hasher is not None:
            self._hasher.update(view)
        return Chunk(view, crc32(view))

    def _leave(self) -> None:
        if self._number is not None:
            self._shared.leave(self._number)
            self._number = None


class BytesPayload(Payload):
    """Pieces of bytes from any iterable; how many they are shows at its end.

    Parameters
    ----------
    pieces : iterable of bytes-like
        Read once, as fast as the slowest receiver takes them. A piece must not change once it was yielded.
    readers : int
        Peers that it will be sent to.
    size : int, optional
        Bytes in all, if they are known.
    """

    kind = "bytes"

    def __init__(
        self, pieces: Iterable[bytes | bytearray | memoryview], *, readers: int = 1, size: int | None = None
    ) -> None:
        super().__init__(size)
        self._pieces = iter(pieces)
        self._readers = readers

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        for piece in self._pieces:
            view = memoryview(piece).cast("B")
            for begin in range(0, len(view), CHUNK_BYTES):
                yield view[begin : begin + CHUNK_BYTES]

    def _share(self) -> SharedChunks:
        if self._shared is not None:
            raise ValueError("these pieces can be read once; make a new payload to send them again")
        return SharedChunks(self.chunks(), expected=self._readers)


class BlobPayload(Payload):
    """A buffer in memory, passed on without a copy; it must not change until it is sent."""

    kind = "blob"
    waits = False

    def __init__(self, content: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(content).cast("B")
        super().__init__(len(self._view))

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        for begin in range(start * CHUNK_BYTES, len(self._view), CHUNK_BYTES):
            yield self._view[begin : begin + CHUNK_BYTES]


class FilePayload(Payload):
    """A file, read chunk by chunk; it must not change until it is sent."""

    kind = "file"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._state = self.path.stat()
        super().__init__(self._state.st_size)

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        begin, end = start * CHUNK_BYTES, self._state.st_size
        with open(self.path, "rb", buffering=CHUNK_BYTES) as file:
            file.seek(begin)
            while begin < end:
                chunk = file.read(min(end - begin, CHUNK_BYTES))
                if len(chunk) < min(end - begin, CHUNK_BYTES):
                    raise DataError(f"{self.path}: shorter than when sending began; send it again")
                yield memoryview(chunk)
                begin += len(chunk)

    def transfer(self) -> bytes:
        state = self._state
        known = (str(self.path.resolve()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        return blake3(repr(known).encode()).digest()


class ObjectPayload(Payload):
    """A container sent item by item; the next item is asked for while the last is under way.

    Parameters
    ----------
    items : mapping of str to array, iterable of (str, array), or iterable of array
        Arrays without names are called ``"0"``, ``"1"``, ... What is no mapping is read once.
    readers : int
        Peers that it will be sent to.
    """

    kind = "object"

    def __init__(self, items: Mapping[str, Any] | Iterable[Item] | Iterable[Any], *, readers: int = 1) -> None:
        super().__init__(None)
        self._items = items
        self._readers = readers

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        items = self._items.items() if isinstance(self._items, Mapping) else _named(self._items)
        return object_chunks(items)

    def _share(self) -> SharedChunks:
        if self._shared is not None and not isinstance(self._items, Mapping):
            raise ValueError("these items can be read once; make a new payload to send them again")
        return SharedChunks(self.chunks(), expected=self._readers)


def _named(items: Iterable[Any]) -> Iterator[Item]:
    numbers = itertools.count()
    for item in items:
        yield item if isinstance(item, tuple) else (str(next(numbers)), item)
        del item  # `enumerate` would keep it while the next one is made


class TensorPayload(Payload):
    """A model in the safetensors layout; its arrays must not change until they are sent.

    Parameters
    ----------
    parameters : mapping of str to ndarray
    quantization : str, optional
        Scheme in which floating-point tensors travel (see `fedbio.tensors.SCHEMES`); they are quantized chunk by chunk
        while they leave, and come out in their own precision.
    exact : container of str
        Names of tensors that are not to be quantized.
    """

    def __init__(
        self,
        parameters: Mapping[str, np.ndarray[Any, Any]],
        quantization: str | None = None,
        *,
        exact: Container[str] = (),
    ) -> None:
        self._parameters = dict(parameters)
        self._exact = exact
        self.quantization = quantization
        if quantization is None:
            self.kind = "tensors"
            self.waits = False
            super().__init__(layout.encoded_size(self._parameters))
        else:
            self.kind = "quantized"
            super().__init__(layout.quantized_size(self._parameters, quantization, exact=exact))

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        if self.quantization is None:
            made = layout.chunks(self._parameters, CHUNK_BYTES)
        else:
            made = layout.quantized_chunks(self._parameters, self.quantization, CHUNK_BYTES, exact=self._exact)
        return itertools.islice(made, start, None)
