"""One conformance suite for all drivers."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from fedbio.errors import MachineError, SettingsError
from fedbio.transport import Credentials, Limits
from fedbio.transport.drivers import Connection, ConnectionClosed, Driver, Lane, Listener, load
from fedbio.transport.frames import Kind, decode, encode

from .conftest import Inbox

Kit = Callable[[str], Credentials]


@pytest.fixture(params=["grpc", "memory"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return load(request.param)


@pytest.fixture
def listener(driver: Driver, credentials: Kit) -> Iterator[Listener]:
    listener = driver.listen("127.0.0.1:0", credentials("server"), Limits())
    yield listener
    listener.close()


@pytest.fixture
def ends(driver: Driver, listener: Listener, credentials: Kit, inbox: Inbox) -> Iterator[tuple[Connection, Connection]]:
    listener.start(inbox)
    here = driver.dial(listener.address, credentials("site-1"), 5.0)
    (there,) = inbox.wait(1)
    assert isinstance(there, Connection)
    yield here, there
    here.abort()
    there.abort()


def test_frames_arrive_whole_and_in_order_both_ways(ends: tuple[Connection, Connection]) -> None:
    frames = [encode(Kind.CHUNK, 1, number, os.urandom(size)) for number, size in enumerate((0, 1, 1_000, 1 << 20, 5))]
    for writer, reader in (ends, ends[::-1]):
        for frame in frames:
            writer.write(frame)
        assert [reader.read() for _ in frames] == frames


def test_peer_is_known_by_its_certificate(ends: tuple[Connection, Connection]) -> None:
    assert ends[1].peer == "site-1"


def test_small_frame_overtakes_bulk_frames(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    bulk, small = encode(Kind.CHUNK, 1, 0, bytes(1 << 20)), encode(Kind.PING)
    writer = threading.Thread(target=lambda: [here.write(bulk, Lane.BULK) for _ in range(64)])
    writer.start()
    there.read()
    here.write(small)
    read = 1
    while there.read() != small:
        read += 1
    # what is in flight below us may still be ahead of it, never the whole model
    assert read < 40
    for _ in range(64 - read):
        there.read()
    writer.join()


def test_bulk_writer_waits_for_the_reader(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    written: list[int] = []
    bulk = encode(Kind.CHUNK, 1, 0, bytes(1 << 20))

    def write() -> None:
        for number in range(100):
            here.write(bulk, Lane.BULK)
            written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(0.5)
    assert writer.is_alive()
    assert len(written) < 100
    for _ in range(100):
        there.read()
    writer.join(5)


def test_lazy_frame_leaves_by_itself_soon(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    here.write(encode(Kind.PONG), Lane.LAZY)
    assert decode(there.read()).kind == Kind.PONG


def test_close_lets_what_was_written_leave(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    for number in range(10):
        here.write(encode(Kind.MESSAGE, number))
    here.close()
    assert [decode(there.read()).stream for _ in range(10)] == list(range(10))
    with pytest.raises(ConnectionClosed):
        there.read()
    with pytest.raises(ConnectionClosed):
        there.write(encode(Kind.PING))
    with pytest.raises(ConnectionClosed):
        here.read()
    with pytest.raises(ConnectionClosed):
        here.write(encode(Kind.PING))


def test_abort_ends_both_ends_at_once(ends: tuple[Connection, Connection]) -> None:
    for end in ends:
        end.abort()
        for other in ends:
            with pytest.raises(ConnectionClosed):
                other.read()


def test_listener_that_closes_ends_its_connections(ends: tuple[Connection, Connection], listener: Listener) -> None:
    listener.close()
    with pytest.raises(ConnectionClosed):
        ends[0].read()


def test_nobody_listening_is_a_connection_refused(driver: Driver, credentials: Kit) -> None:
    with pytest.raises(ConnectionClosed, match="connection refused"):
        driver.dial("127.0.0.1:1", credentials("site-1"), 5.0)


def test_port_in_use_is_named(driver: Driver, listener: Listener, credentials: Kit) -> None:
    port = listener.address.rpartition(":")[2]
    with pytest.raises(MachineError, match=f"port {port} is in use"):
        driver.listen(listener.address, credentials("server"), Limits())


def test_connection_that_never_finishes_tls_is_ended(credentials: Kit) -> None:
    listener = load("grpc").listen("127.0.0.1:0", credentials("server"), Limits(handshake_s=0.5))
    listener.start(lambda connection: None)
    host, _, port = listener.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(b"\x16\x03\x01")  # a TLS record that never goes on
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(100) == b""
    listener.close()


def test_unknown_driver_is_refused_with_those_known() -> None:
    with pytest.raises(SettingsError, match="expected one of grpc, memory, found 'smoke-signals'"):
        load("smoke-signals")
