"""Chunks that several threads read: made once, kept for those a little later, and never mixed up."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from blake3 import blake3
from isal.isal_zlib import crc32

from fedbio.errors import DataError
from fedbio.transport import BlobPayload, BytesPayload, ObjectPayload, sharing
from fedbio.transport.sharing import KEPT_CHUNKS, SharedChunks

from .conftest import eventually


def pieces(count: int) -> list[bytes]:
    return [bytes([number]) * (number + 1) for number in range(count)]


def read_all(shared: SharedChunks, reader: int, pause_s: float = 0.0) -> list[bytes]:
    found = []
    while (chunk := shared.get(reader)) is not None:
        found.append(bytes(chunk.view))
        time.sleep(pause_s)
    return found


def in_threads(*work: object) -> list[threading.Thread]:
    threads = [threading.Thread(target=one) for one in work]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    return threads


def counted(made: list[bytes], count: int) -> Iterator[memoryview]:
    for piece in pieces(count):
        made.append(piece)
        yield memoryview(piece)


def test_readers_get_every_chunk_which_is_made_once() -> None:
    made: list[bytes] = []
    shared = SharedChunks(counted(made, 60))
    found: dict[int, list[bytes]] = {}
    numbers = [shared.join() for _ in range(3)]

    def read(number: int) -> None:
        found[number] = read_all(shared, number)

    for thread in in_threads(*(lambda number=number: read(number) for number in numbers)):  # type: ignore[misc]
        thread.join(10)
    assert list(found.values()) == [pieces(60)] * 3
    assert made == pieces(60)
    assert shared.digest == blake3(b"".join(pieces(60))).digest()


def test_chunk_carries_the_crc_of_its_bytes() -> None:
    shared = SharedChunks(counted([], 2))
    reader = shared.join()
    assert reader is not None
    assert [shared.get(reader), shared.get(reader)] == [(b"\0", crc32(b"\0")), (b"\1\1", crc32(b"\1\1"))]


def test_reader_who_comes_after_the_first_chunks_are_gone_begins_anew() -> None:
    payload = BlobPayload(bytes(3 * KEPT_CHUNKS << 20))
    with payload.read() as first:
        chunks = iter(first)
        for _ in range(KEPT_CHUNKS + 1):
            next(chunks)
        with payload.read() as second:
            assert second._shared is not first._shared
            assert second.finish() == first.finish()


def test_slow_reader_is_left_behind_soon_and_still_gets_the_right_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PATIENCE_S", 0.05)
    content = np.random.default_rng(1).bytes(4 * KEPT_CHUNKS << 20)
    payload = BlobPayload(content)
    fast, slow = payload.read(), payload.read()
    begun = iter(slow)
    got = [next(begun).view]
    started = time.monotonic()
    digest = fast.finish()
    assert time.monotonic() - started < 2.0
    got += [chunk.view for chunk in slow]
    assert b"".join(got) == content
    assert slow.finish() == digest == blake3(content).digest()


def test_steadily_slow_reader_does_not_hold_the_others_to_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PATIENCE_S", 0.1)
    shared = SharedChunks(counted([], 100))
    fast, slow = shared.join(), shared.join()
    assert fast is not None
    assert slow is not None

    def read_slowly() -> None:
        with pytest.raises(LookupError):
            read_all(shared, slow, pause_s=0.02)

    [thread] = in_threads(read_slowly)
    started = time.monotonic()
    assert read_all(shared, fast) == pieces(100)
    assert time.monotonic() - started < 1.0  # at the slow one's pace it would have been two seconds
    thread.join(5)


def test_what_is_read_once_waits_for_the_slowest_reader() -> None:
    made: list[bytes] = []
    shared = SharedChunks(counted(made, 40), expected=2)
    fast = shared.join()
    assert fast is not None
    found: list[list[bytes]] = []
    [thread] = in_threads(lambda: found.append(read_all(shared, fast)))
    eventually(lambda: len(made) == KEPT_CHUNKS + 1)
    time.sleep(0.05)
    assert len(made) == KEPT_CHUNKS + 1
    slow = shared.join()
    assert slow is not None
    assert read_all(shared, slow) == pieces(40)
    thread.join(5)
    assert found == [pieces(40)]


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "never comes"])
def test_reader_who_is_given_up_holds_nobody(leaves: bool) -> None:
    payload = BytesPayload((b"x" * 1000 for _ in range(3 * KEPT_CHUNKS)), readers=2)
    reader = payload.read()
    if leaves:
        with payload.read() as other:
            next(iter(other))
    else:
        payload.forgo()
    digests: list[bytes] = []
    [thread] = in_threads(lambda: digests.append(reader.finish()))
    thread.join(5)
    assert digests == [blake3(b"x" * 3000 * KEPT_CHUNKS).digest()]


def test_more_readers_than_were_announced_all_get_the_whole() -> None:
    items = {str(number): np.full(300_000, number, np.float32) for number in range(2 * KEPT_CHUNKS)}
    payload = ObjectPayload(items)
    quick, slow = payload.read(), payload.read()
    digests: list[bytes] = []
    with quick:
        [thread] = in_threads(lambda: digests.append(quick.finish()))
        time.sleep(0.05)
        content = [bytes(chunk.view) for chunk in slow]
        thread.join(5)
    assert digests == [blake3(b"".join(content)).digest()] == [slow.finish()]


def test_pieces_that_were_read_cannot_be_read_again() -> None:
    payload = BytesPayload([b"x" * (KEPT_CHUNKS + 2 << 20)])
    payload.digest()
    with pytest.raises(ValueError, match="these pieces can be read once; make a new payload to send them again"):
        payload.read()


def test_failure_while_a_chunk_is_made_reaches_every_reader_and_not_the_next_sending() -> None:
    class Flaky(BlobPayload):
        def chunks(self, start: int = 0) -> Iterator[memoryview]:
            yield from itertools.islice(super().chunks(start), 1)
            if fails:
                raise DataError("the disk is gone")
            yield from super().chunks(start + 1)

    fails = True
    payload = Flaky(bytes(3 << 20))
    for reader in (payload.read(), payload.read()):
        with pytest.raises(DataError, match="the disk is gone"):
            reader.finish()
    fails = False
    assert payload.digest() == blake3(bytes(3 << 20)).digest()
