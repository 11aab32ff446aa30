"""Where a payload goes while it arrives: to memory, to a file, or into a consumer.

An endpoint chooses by kind and size: memory for what is small, a spool file for the rest. Its owner chooses otherwise
for a topic: ``sinks={"weights": lambda opening: FileSink(folder / "weights.safetensors")}``. A sink's `write` may
block: the sender is then granted no more chunks.
"""

from __future__ import annotations

__all__ = [
    "ConsumerSink",
    "FileSink",
    "MemorySink",
    "ObjectSink",
    "Opening",
    "ReceivedPayload",
    "Sink",
    "SpoolSink",
    "SpooledFileSink",
    "TensorSink",
]

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from fedbio import tensors as layout
from fedbio.files import whole_file
from fedbio.tensors import LayoutReader, TensorLimits
from fedbio.tensors.layout import manifest_header
from fedbio.transport.objects import CHUNK_BYTES, Item, ObjectReader
from fedbio.transport.spool import Partial, Spool, make_room

BESIDE = 8
"""Half-received files that wait for their rest beside one place."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What is known of a message before its payload arrives; all of it is the peer's word but its name."""

    peer: str
    """Who sends it: the name in the sender's certificate."""
    topic: str
    body: bytes
    kind: str
    """Which payload was sent, see `fedbio.transport.payloads`."""
    size: int | None
    """Bytes of the payload as they travel; None if their number is not known yet."""
    transfer: bytes | None = None
    """What a file is known by at its sender."""


class Sink(ABC):
    """Takes a payload in.

    Attributes
    ----------
    waits : bool
        Whether `write` may take its time. One that never does is called on the thread that reads the connection, which
        saves a hand-over for each chunk.
    """

    waits = True

    def resume(self) -> tuple[blake3, int]:
        """Return what is there from earlier, as its running digest and the number of its chunks."""
        return blake3(), 0

    def restart(self) -> None:  # noqa: B027 - only a sink that resumes has something to forget
        """Forget what `resume` told of: it is not the beginning of what is sent now."""

    @abstractmethod
    def write(self, chunk: memoryview) -> None:
        """Take the next bytes. They are memory of their own, which may be kept and must not be changed."""

    @abstractmethod
    def finish(self) -> Any:
        """Return what shall be the message's payload: all bytes have come and their digest is right."""

    def abort(self) -> None:  # noqa: B027 - most sinks have nothing to undo
        """What came is not what was sent, or will not be taken."""

    def suspend(self) -> None:
        """The sender is gone; it may come back with the same payload, to this process or to the next."""
        self.abort()


class ReceivedPayload:
    """A payload that has arrived whole and was checked; memory or disk is given back with the object.

    Attributes
    ----------
    size : int
        Bytes in all.
    """

    def __init__(self, content: memoryview, spool: Spool | Partial | None = None) -> None:
        self.size = len(content)
        self._content = content
        self._spool = spool

    @property
    def content(self) -> memoryview:
        """The bytes, read-only."""
        return self._content

    def tensors(self, limits: TensorLimits | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Return a model's arrays over the payload, without a copy; raise `FormatError` if it is malformed."""
        return layout.parse(self._content, limits=limits)

    def items(self) -> Iterator[Item]:
        """Yield an object stream's items; raise `FormatError` if it is malformed."""
        reader = ObjectReader(self.size)
        for begin in range(0, self.size, CHUNK_BYTES):
            yield from reader.feed(self._content[begin : begin + CHUNK_BYTES])
        reader.finish()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the payload to `path`, whole or not at all; a spooled one on the same disk is moved, not copied."""
        with whole_file(path) as beside:
            if self._spool is None or not self._spool.link(beside):
                with open(beside, "wb") as file:
                    for begin in range(0, self.size, CHUNK_BYTES):
                        file.write(self._content[begin : begin + CHUNK_BYTES])


class MemorySink(Sink):
    """One buffer of the declared size; its pages are taken as chunks fill them."""

    waits = False

    def __init__(self, size: int, on_freed: Callable[[], object] | None = None) -> None:
        array = np.empty(size, np.uint8)
        if on_freed is not None:
            # when the last view of it is gone, on whatever thread that happens
            weakref.finalize(array, on_freed)
        self._view = array.data
        self._filled = 0

    def write(self, chunk: memoryview) -> None:
        end = self._filled + len(chunk)
        self._view[self._filled : end] = chunk
        self._filled = end

    def finish(self) -> ReceivedPayload:
        return ReceivedPayload(self._view[: self._filled].toreadonly())


class SpoolSink(Sink):
    """A nameless file in a folder, gone with the process."""

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self._spool = Spool(folder, size or 0)

    def write(self, chunk: memoryview) -> None:
        self._spool.write(chunk)

    def finish(self) -> ReceivedPayload:
        return ReceivedPayload(self._spool.map(), self._spool)


class _PartialSink(Sink):
    """A file that goes on where it was when its sender comes back, killed or not."""

    partial: Partial

    def resume(self) -> tuple[blake3, int]:
        return self.partial.hasher(), self.partial.chunks

    def restart(self) -> None:
        self.partial.restart()

    def write(self, chunk: memoryview) -> None:
        self.partial.write(chunk)

    def abort(self) -> None:
        self.partial.discard()

    def suspend(self) -> None:
        self.partial.keep()


class SpooledFileSink(_PartialSink):
    """A file in the spool folder, for those that nobody has given a place."""

    def __init__(self, folder: Path, opening: Opening, most: int) -> None:
        prefix = f".file-{blake3(opening.peer.encode()).hexdigest(8)}-"
        self.partial = Partial(folder, prefix, opening.peer, opening.transfer, opening.size)
        make_room(folder, prefix, most)

    def finish(self) -> ReceivedPayload:
        return ReceivedPayload(self.partial.map(), self.partial)


class FileSink(_PartialSink):
    """A file of a given name, which appears whole or not at all; `Received.payload` is its path.

    A file that was sent as one (`FilePayload`) goes on where it was when either end comes back, killed or not: until
    it is whole it lies beside its place as ``.NAME.ID.part``.
    """

    def __init__(self, path: str | os.PathLike[str], opening: Opening) -> None:
        self.path = Path(path)
        prefix = f".{self.path.name}."
        self.partial = Partial(self.path.parent, prefix, opening.peer, opening.transfer, opening.size)
        make_room(self.path.parent, prefix, BESIDE)

    def finish(self) -> Path:
        self.partial.become(self.path)
        return self.path


class ConsumerSink(Sink):
    """Calls a function with each chunk as it arrives; `Received.payload` is the number of bytes.

    The whole is known to be right only when the message is delivered: use nothing of it before.

    Parameters
    ----------
    consume : callable
        Given a chunk of at most 1 MiB, which it may keep.
    waits : bool
        Whether it may take its time; the sender then waits too. What never does, such as a running sum, is quicker
        without.
    """

    def __init__(self, consume: Callable[[memoryview], object], *, waits: bool = True) -> None:
        self._consume = consume
        self.waits = waits
        self._bytes = 0

    def write(self, chunk: memoryview) -> None:
        self._consume(chunk)
        self._bytes += len(chunk)

    def finish(self) -> int:
        return self._bytes


class ObjectSink(Sink):
    """Calls a function with each item of an object stream, one in memory at a time; see `ConsumerSink`.

    Parameters
    ----------
    consume : callable
        Called with a name and an array of its own.
    max_item_bytes : int
        The largest item that memory is taken for.
    """

    def __init__(self, consume: Callable[[str, np.ndarray[Any, Any]], object], max_item_bytes: int = 16 << 30) -> None:
        self._reader = ObjectReader(max_item_bytes)
        self._consume = consume
        self._items = 0

    def write(self, chunk: memoryview) -> None:
        for name, array in self._reader.feed(chunk):
            self._consume(name, array)
            self._items += 1

    def finish(self) -> int:
        self._reader.finish()
        return self._items


class TensorSink(Sink):
    """Takes a model in whatever scheme it travels, and lays it out in its own precision while it arrives.

    Parameters
    ----------
    store : callable
        Returns the sink for the plain layout, given its size.
    schemes : collection of str, optional
        Quantization schemes that are taken; by default all.
    """

    def __init__(
        self,
        store: Callable[[int], Sink],
        schemes: Collection[str] | None = None,
        limits: TensorLimits | None = None,
    ) -> None:
        self._reader = LayoutReader(limits=limits) if schemes is None else LayoutReader(limits=limits, schemes=schemes)
        self._make_store = store
        self._store: Sink | None = None

    def write(self, chunk: memoryview) -> None:
        for piece in self._reader.feed(chunk):
            if self._store is None:
                self._open()
            assert self._store is not None
            self._store.write(piece.values.view(np.uint8).data)

    def finish(self) -> Any:
        self._reader.finish()
        if self._store is None:
            self._open()
        assert self._store is not None
        return self._store.finish()

    def abort(self) -> None:
        if self._store is not None:
            self._store.abort()

    def _open(self) -> None:
        assert self._reader.specs is not None
        head = manifest_header(self._reader.specs)
        data = sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for shape, dtype in self._reader.specs.values())
        self._store = self._make_store(len(head) + data)
        self._store.write(memoryview(head))
