"""Take in the tensors that one site of a split session sends to the other, no more and no larger ones than allowed."""

from __future__ import annotations

__all__ = ["MAX_ITEMS", "ItemsSink"]

from collections.abc import Callable

from fedbio.errors import FedbioError, ProtocolError
from fedbio.federation.model import Parameters
from fedbio.transport import Sink
from fedbio.transport.objects import ObjectReader

MAX_ITEMS = 64
"""Tensors in one message: a network is cut at a few places at once, not at many."""

ANNOUNCEMENTS_BYTES = 64 << 10
"""What the names and shapes of a message may take beside its tensors."""


class ItemsSink(Sink):
    """Keeps the items of an object stream in memory; `Received.payload` is a dict of arrays by name.

    Parameters
    ----------
    max_bytes : int
        Bytes of all tensors together; an announcement beyond it is refused before memory is taken.
    on_abort : callable, optional
        Called with the reason if the message is not taken.
    on_gone : callable, optional
        Called if its sender is gone before it was whole; without it that is one more reason for `on_abort`.
    """

    def __init__(
        self,
        max_bytes: int,
        on_abort: Callable[[str], None] | None = None,
        on_gone: Callable[[], None] | None = None,
    ) -> None:
        self._reader = ObjectReader(max_bytes)
        self._most = max_bytes
        self._on_abort, self._on_gone = on_abort, on_gone
        self._bytes = 0
        self._items: Parameters = {}
        self._problem = "it was cut short, or is not what was sent"

    def write(self, chunk: memoryview) -> None:
        try:
            self._take(chunk)
        except FedbioError as error:
            self._problem = str(error)
            raise

    def finish(self) -> Parameters:
        self._reader.finish()
        return self._items

    def abort(self) -> None:
        if self._on_abort is not None:
            self._on_abort(self._problem)

    def suspend(self) -> None:
        if self._on_gone is None:
            self.abort()
        else:
            self._on_gone()

    def _take(self, chunk: memoryview) -> None:
        self._bytes += len(chunk)
        if self._bytes > self._most + ANNOUNCEMENTS_BYTES:
            raise ProtocolError(f"tensors of more than {self._most} bytes in one message of a split session")
        for name, array in self._reader.feed(chunk):
            if name in self._items or len(self._items) == MAX_ITEMS:
                raise ProtocolError(
                    f"item {name[:64]!r} comes twice, or after {MAX_ITEMS} others, in one message of a split session"
                )
            self._items[name] = array
