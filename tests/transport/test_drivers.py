"""One conformance suite for all drivers, with and without TLS."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbio.errors import MachineError, ProtocolError, SettingsError
from fedbio.transport import Credentials, Limits
from fedbio.transport.credentials import Identity, Unencrypted
from fedbio.transport.drivers import HANDSHAKE_BYTES, Connection, ConnectionClosed, Driver, Lane, Listener, load
from fedbio.transport.frames import MAX_PAYLOAD_BYTES, Kind, make

from .conftest import Inbox

Kit = Callable[[str], Identity]
Ends = tuple[Connection, Connection]

NAMES = ("grpc", "tcp", "http", "memory", "unix")
EXAMPLE = Path(__file__).parent / "example_driver"


@pytest.fixture(scope="module", autouse=True)
def example_is_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the example on the path as `pip install` would, with the entry point that its pyproject.toml declares."""
    folder = tmp_path_factory.mktemp("site-packages")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copy(EXAMPLE / "fedbio_unix.py", folder)
    installed = folder / "fedbio_unix-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {target}" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("fedbio_unix", None)


@pytest.fixture(params=[*(f"{name}-{tls}" for name in NAMES for tls in ("tls", "plain")), "local-plain"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def driver(way: str) -> Driver:
    return load(way.partition("-")[0])


@pytest.fixture
def place(way: str, tmp_path: Path) -> str:
    return str(tmp_path / "socket") if way.startswith(("unix", "local")) else "127.0.0.1:0"


@pytest.fixture
def identity(way: str, credentials: Callable[[str], Credentials]) -> Kit:
    return credentials if way.endswith("-tls") else Unencrypted


@pytest.fixture
def listener(driver: Driver, place: str, identity: Kit) -> Iterator[Listener]:
    listener = driver.listen(place, identity("server"), Limits())
    yield listener
    listener.close()


@pytest.fixture
def ends(driver: Driver, listener: Listener, identity: Kit, inbox: Inbox) -> Iterator[Ends]:
    listener.start(inbox)
    here = driver.dial(listener.address, identity("site-1"), 5.0)
    (there,) = inbox.wait(1)
    assert isinstance(there, Connection)
    here.allowed_bytes = there.allowed_bytes = MAX_PAYLOAD_BYTES
    yield here, there
    here.abort()
    there.abort()


def test_frames_arrive_whole_and_in_order_both_ways(ends: Ends) -> None:
    sizes = (0, 1, 1_000, MAX_PAYLOAD_BYTES, 5, 100_000, 0)
    frames = [make(Kind.CHUNK, 1, number, os.urandom(size)) for number, size in enumerate(sizes)]
    for writer, reader in (ends, ends[::-1]):
        for frame in frames:
            writer.write(frame)
        assert [reader.read() for _ in frames] == frames


def test_both_ways_at_once_at_full_speed(ends: Ends) -> None:
    frame = make(Kind.CHUNK, 1, 0, os.urandom(MAX_PAYLOAD_BYTES))
    writers = [
        threading.Thread(target=lambda end=end: [end.write(frame, Lane.BULK) for _ in range(50)]) for end in ends
    ]
    found: list[bool] = []
    readers = [
        threading.Thread(target=lambda end=end: found.extend(end.read() == frame for _ in range(50))) for end in ends
    ]
    for thread in (*writers, *readers):
        thread.start()
    for thread in (*writers, *readers):
        thread.join(30)
    assert found == [True] * 100


def test_peer_is_known_by_its_name(ends: Ends) -> None:
    assert ends[1].peer == "site-1"


@pytest.mark.parametrize("most", [HANDSHAKE_BYTES, 100])
def test_payload_over_what_is_allowed_is_refused(ends: Ends, most: int) -> None:
    here, there = ends
    there.allowed_bytes = most
    here.write(make(Kind.MESSAGE, payload=bytes(most)))
    assert len(there.read().payload) == most
    here.write(make(Kind.MESSAGE, payload=bytes(most + 1)))
    with pytest.raises(ProtocolError, match=f"frame declares {most + 1} bytes, at most {most} are allowed"):
        there.read()


def test_small_frame_overtakes_bulk_frames(ends: Ends) -> None:
    here, there = ends
    bulk, small = make(Kind.CHUNK, 1, 0, bytes(1 << 20)), make(Kind.PING)
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


def test_bulk_writer_waits_for_the_reader(ends: Ends) -> None:
    here, there = ends
    written: list[int] = []
    bulk = make(Kind.CHUNK, 1, 0, bytes(1 << 20))

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


def test_lazy_frame_leaves_by_itself_soon(ends: Ends) -> None:
    here, there = ends
    here.write(make(Kind.PONG), Lane.LAZY)
    assert there.read().kind == Kind.PONG


def test_close_lets_what_was_written_leave(ends: Ends) -> None:
    here, there = ends
    for number in range(10):
        here.write(make(Kind.MESSAGE, number, 0, bytes(200_000)))
    here.close()
    assert [there.read().stream for _ in range(10)] == list(range(10))
    with pytest.raises(ConnectionClosed):
        there.read()
    with pytest.raises(ConnectionClosed):
        there.write(make(Kind.PING))
    with pytest.raises(ConnectionClosed):
        here.read()
    with pytest.raises(ConnectionClosed):
        here.write(make(Kind.PING))


def test_abort_ends_both_ends_at_once(ends: Ends) -> None:
    for end in ends:
        end.abort()
        for other in ends:
            with pytest.raises(ConnectionClosed):
                other.read()


def test_abort_wakes_a_writer_that_waits(ends: Ends) -> None:
    woken = threading.Event()

    def write() -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                ends[0].write(make(Kind.CHUNK, 1, 0, bytes(1 << 20)), Lane.BULK)
        woken.set()

    threading.Thread(target=write).start()
    assert not woken.wait(0.3)
    ends[0].abort()
    assert woken.wait(5)


def test_reader_is_woken_when_the_connection_is_closed_here(ends: Ends) -> None:
    woken = threading.Event()

    def read() -> None:
        with contextlib.suppress(ConnectionClosed):
            ends[0].read()
        woken.set()

    threading.Thread(target=read).start()
    ends[0].close()
    assert woken.wait(5)


def test_listener_that_closes_ends_its_connections(ends: Ends, listener: Listener) -> None:
    listener.close()
    with pytest.raises(ConnectionClosed):
        ends[0].read()


def test_nobody_listening_is_a_connection_refused(driver: Driver, place: str, identity: Kit) -> None:
    with pytest.raises(ConnectionClosed, match="connection refused"):
        driver.dial(place.replace(":0", ":1"), identity("site-1"), 5.0)


def test_address_in_use_is_named(driver: Driver, listener: Listener, identity: Kit) -> None:
    port = listener.address.rpartition(":")[2]
    with pytest.raises(MachineError, match=f"{port} is in use"):
        driver.listen(listener.address, identity("server"), Limits())


def test_address_is_free_after_close(driver: Driver, ends: Ends, listener: Listener, identity: Kit) -> None:
    listener.close()
    again = driver.listen(listener.address, identity("server"), Limits())
    again.close()


def test_unknown_driver_is_refused_with_all_that_exist() -> None:
    drivers = "grpc, tcp, http, memory, local, unix"
    with pytest.raises(SettingsError, match=f"expected one of {drivers}, found 'smoke-signals'"):
        load("smoke-signals")
