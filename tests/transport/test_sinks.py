"""Sinks and the files behind them: whole or not at all, resumed by name alone, never in each other's way."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from fedbio.errors import FormatError
from fedbio.transport import ConsumerSink, FileSink, MemorySink, ObjectSink, Opening, ReceivedPayload, SpoolSink, spool
from fedbio.transport.objects import CHUNK_BYTES, object_chunks
from fedbio.transport.sinks import SpooledFileSink
from fedbio.transport.spool import Partial, make_room, sweep

CONTENT = np.random.default_rng(0).bytes(3 * CHUNK_BYTES + 100)


def opening(transfer: bytes | None = bytes(32), size: int | None = len(CONTENT), peer: str = "site-1") -> Opening:
    return Opening(peer, "weights", b"", "file", size, transfer)


def feed(sink: Any, content: bytes = CONTENT, start: int = 0, chunks: int | None = None) -> Any:
    stop = len(content) if chunks is None else (start + chunks) * CHUNK_BYTES
    for begin in range(start * CHUNK_BYTES, stop, CHUNK_BYTES):
        sink.write(memoryview(content)[begin : begin + CHUNK_BYTES])
    return sink


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_sink_hands_over_what_was_written(tmp_path: Path) -> None:
    for sink in (MemorySink(len(CONTENT)), SpoolSink(tmp_path, len(CONTENT)), SpoolSink(tmp_path)):
        payload = feed(sink).finish()
        assert isinstance(payload, ReceivedPayload)
        assert (payload.size, bytes(payload.content)) == (len(CONTENT), CONTENT)
        with pytest.raises(TypeError):
            payload.content[0] = 1
        payload.save(tmp_path / "saved")
        assert (tmp_path / "saved").read_bytes() == CONTENT
    assert names(tmp_path) == ["saved"]
    pieces: list[bytes] = []
    assert feed(ConsumerSink(lambda chunk: pieces.append(bytes(chunk)))).finish() == len(CONTENT)
    assert b"".join(pieces) == CONTENT


def test_empty_payload_is_empty_everywhere(tmp_path: Path) -> None:
    for sink in (MemorySink(0), SpoolSink(tmp_path), SpooledFileSink(tmp_path, opening(size=0), 8)):
        assert bytes(sink.finish().content) == b""
    assert FileSink(tmp_path / "empty", opening(size=0)).finish().read_bytes() == b""


def test_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    sink = feed(FileSink(tmp_path / "weights", opening()))
    assert not (tmp_path / "weights").exists()
    assert sink.finish() == tmp_path / "weights"
    assert (tmp_path / "weights").read_bytes() == CONTENT
    assert names(tmp_path) == ["weights"]


def test_file_that_is_not_right_leaves_nothing_and_the_one_before_in_place(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("before")
    feed(FileSink(tmp_path / "weights", opening())).abort()
    assert names(tmp_path) == ["weights"]
    assert (tmp_path / "weights").read_text() == "before"


def test_suspended_file_goes_on_where_it_was(tmp_path: Path) -> None:
    first = feed(FileSink(tmp_path / "weights", opening()), chunks=2)
    first.write(memoryview(b"half a chunk"))  # as a kill leaves it
    first.suspend()
    second = FileSink(tmp_path / "weights", opening())
    running, chunks = second.resume()
    assert (running.digest(), chunks) == (blake3(CONTENT[: 2 * CHUNK_BYTES]).digest(), 2)
    assert feed(second, start=2).finish().read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("again", "chunks"),
    [
        (opening(), 2),
        (opening(bytes(31) + b"x"), 0),
        (opening(peer="site-2"), 0),
        (opening(size=CHUNK_BYTES + 5), 1),
        (opening(size=None), 0),
    ],
    ids=["same", "transfer", "peer", "shorter", "unknown size"],
)
def test_beginning_is_taken_up_only_by_the_same_transfer_of_the_same_peer(
    tmp_path: Path, again: Opening, chunks: int
) -> None:
    feed(SpooledFileSink(tmp_path, opening(), 8), chunks=2).suspend()
    assert SpooledFileSink(tmp_path, again, 8).resume()[1] == chunks


def test_restarted_file_forgets_its_beginning(tmp_path: Path) -> None:
    feed(FileSink(tmp_path / "weights", opening()), bytes(len(CONTENT)), chunks=2).suspend()
    sink = FileSink(tmp_path / "weights", opening())
    assert sink.resume()[1] == 2
    sink.restart()
    assert feed(sink).finish().read_bytes() == CONTENT


def test_file_without_a_transfer_is_not_kept(tmp_path: Path) -> None:
    feed(FileSink(tmp_path / "weights", opening(transfer=None)), chunks=2).suspend()
    assert names(tmp_path) == []


def test_same_file_twice_at_once_comes_whole_both_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PATIENCE_S", 0.1)
    first = feed(SpooledFileSink(tmp_path, opening(), 8), chunks=1)
    second = SpooledFileSink(tmp_path, opening(), 8)
    assert second.resume()[1] == 0
    one, other = feed(first, start=1).finish(), feed(second).finish()
    assert bytes(one.content) == bytes(other.content) == CONTENT


def test_same_file_comes_again_while_the_first_is_in_use(tmp_path: Path) -> None:
    started = time.monotonic()
    first = feed(SpooledFileSink(tmp_path, opening(), 8)).finish()
    second = feed(SpooledFileSink(tmp_path, opening(), 8)).finish()
    assert time.monotonic() - started < 1.0  # without waiting for the name
    del first
    gc.collect()
    assert bytes(second.content) == CONTENT
    second.save(tmp_path / "saved")
    del second
    gc.collect()
    assert names(tmp_path) == ["saved"]


def test_file_that_waits_for_a_name_does_not_touch_the_whole_one(tmp_path: Path) -> None:
    first = feed(FileSink(tmp_path / "weights", opening()))
    waiting: list[FileSink] = []
    thread = threading.Thread(target=lambda: waiting.append(FileSink(tmp_path / "weights", opening())))
    thread.start()
    time.sleep(0.1)
    first.finish()
    thread.join(5)
    assert waiting[0].resume()[1] == 0
    feed(waiting[0], chunks=1)
    assert (tmp_path / "weights").read_bytes() == CONTENT


def test_name_of_a_half_received_file_holds_nothing_that_the_peer_has_said(tmp_path: Path) -> None:
    sink = SpooledFileSink(tmp_path, Opening("../evil/peer", "../../topic", b"", "file", 100, b"/../" * 8), 8)
    [name] = names(tmp_path)
    assert name.startswith(".file-")
    assert set(name) <= set(".-abcdefghijklmnopqrstuvwxyz0123456789")
    sink.abort()
    assert names(tmp_path) == []


def test_oldest_half_received_files_of_a_peer_give_way_and_those_in_use_do_not(tmp_path: Path) -> None:
    transfers = [bytes([number]) * 32 for number in range(6)]
    active = feed(SpooledFileSink(tmp_path, opening(transfers[0]), 3), chunks=1)
    other = feed(SpooledFileSink(tmp_path, opening(transfers[1], peer="site-2"), 3), chunks=1)
    other.suspend()
    for number, transfer in enumerate(transfers[1:]):
        sink = feed(SpooledFileSink(tmp_path, opening(transfer), 3), chunks=1)
        os.utime(sink.partial._path, (number, number))
        sink.suspend()
    counts = [SpooledFileSink(tmp_path, opening(transfer), 9).resume()[1] for transfer in transfers[1:]]
    assert counts == [0, 0, 0, 1, 1]
    assert bytes(feed(active, start=1).finish().content) == CONTENT
    assert SpooledFileSink(tmp_path, opening(transfers[1], peer="site-2"), 3).resume()[1] == 1


def test_files_beside_one_place_are_capped(tmp_path: Path) -> None:
    for number in range(12):
        feed(FileSink(tmp_path / "we[i]ghts", opening(bytes([number]) * 32)), chunks=1).suspend()
    assert len(names(tmp_path)) == 8


def test_sweep_removes_what_is_old_or_was_in_use_by_a_process_that_is_gone(tmp_path: Path) -> None:
    young = Partial(tmp_path, ".file-", "site-1", b"y" * 32, 100)
    young.keep()
    old = Partial(tmp_path, ".file-", "site-1", b"o" * 32, 100)
    used = Partial(tmp_path, ".file-", "site-1", b"u" * 32, 100)
    for partial in (old, used):
        os.utime(partial._path, (1, 1))
    old.keep()
    (tmp_path / ".whole-0123.part").write_text("left by a process that was killed")
    (tmp_path / "other.part").write_text("not ours")
    sweep(tmp_path, 60.0)
    assert set(names(tmp_path)) == {young._path.name, used._path.name, "other.part"}
    sweep(tmp_path / "missing", 60.0)


def test_make_room_in_an_empty_folder_does_nothing(tmp_path: Path) -> None:
    make_room(tmp_path, ".file-", 0)


def test_file_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    larger = room.f_bavail * room.f_frsize + (1 << 40)
    for make in (
        lambda: FileSink(tmp_path / "weights", opening(size=larger)),
        lambda: SpooledFileSink(tmp_path, opening(size=larger), 8),
        lambda: SpoolSink(tmp_path, larger),
    ):
        with pytest.raises(OSError, match=r"No space left|too large") as refused:
            make()
        assert refused.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert names(tmp_path) == []


def test_objects_come_one_by_one_and_a_malformed_one_is_refused() -> None:
    items = {str(number): np.full(400_000, number, np.float32) for number in range(3)}
    content = b"".join(object_chunks(items.items()))
    got: dict[str, Any] = {}
    assert feed(ObjectSink(got.__setitem__), content).finish() == 3
    for name, array in items.items():
        np.testing.assert_array_equal(got[name], array)
    with pytest.raises(FormatError, match="cut short"):
        feed(ObjectSink(got.__setitem__), content[:-1]).finish()
    with pytest.raises(FormatError, match="item '0': 1600000 bytes, at most 1000 are allowed"):
        feed(ObjectSink(got.__setitem__, max_item_bytes=1000), content)


def test_memory_is_given_back_with_the_last_view_of_it() -> None:
    freed: list[int] = []
    payload = feed(MemorySink(len(CONTENT), lambda: freed.append(1))).finish()
    view = payload.content[10:20]
    del payload
    gc.collect()
    assert freed == []
    del view
    gc.collect()
    assert freed == [1]
