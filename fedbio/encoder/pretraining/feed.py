"""Prepare the batches of the next updates on a thread of its own, while the network works on this one."""

from __future__ import annotations

__all__ = ["Portion", "portions"]

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from fedbio.encoder.packs import ENDS
from fedbio.encoder.pretraining.batches import Batch, Packs, Place

AHEAD = 2
"""Updates whose batches wait ready-made."""


@dataclass(frozen=True)
class Portion:
    """What one update learns from.

    Parameters
    ----------
    batches : list of Batch
        This process's packs.
    tokens : int
        Of all processes' packs.
    after : Place
        Where the next update's packs begin.
    """

    batches: list[Batch]
    tokens: int
    after: Place


@contextlib.contextmanager
def portions(
    packs: Packs, place: Place, *, packs_per_update: int, share: tuple[int, int] = (0, 1), pinned: bool = False
) -> Iterator[Iterator[Portion]]:
    """Yield the updates' batches from a place on, for as long as the block runs.

    Parameters
    ----------
    packs : Packs
    place : Place
    packs_per_update : int
        Over all processes.
    share : (int, int)
        Number of this process, and how many there are; each takes every so-manieth pack of an update.
    pinned : bool
        Put batches into memory that a GPU copies from by itself.
    """
    ready: queue.Queue[Portion | BaseException] = queue.Queue(AHEAD)
    over = threading.Event()

    def hand_over(item: Portion | BaseException) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def prepare() -> None:
        try:
            places = packs.places(place)
            while not over.is_set():
                chosen = list(itertools.islice(places, packs_per_update))
                batches = [packs.batch(here, begins, sizes) for here, _, begins, sizes in chosen[share[0] :: share[1]]]
                tokens = sum(int((sizes + ENDS).sum()) for _, _, _, sizes in chosen)
                hand_over(Portion([batch.pinned() if pinned else batch for batch in batches], tokens, chosen[-1][1]))
        except BaseException as error:
            hand_over(error)

    def taken() -> Iterator[Portion]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=prepare, name="batches", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        over.set()
        thread.join()
