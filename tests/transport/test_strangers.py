"""Peers that must not be let in, over real sockets: bad certificates, no certificates, other protocols, crowds."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbio.errors import MachineError, RefusedError
from fedbio.transport import Credentials, Limits
from fedbio.transport.credentials import Unencrypted
from fedbio.transport.drivers import Connection, ConnectionClosed, Driver, Listener, load
from fedbio.transport.frames import Kind, make

from .conftest import Inbox, eventually
from .test_credentials import reissued

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
PATIENT = 5.0

Kit = Callable[[str], Credentials]


@pytest.fixture(params=["grpc", "tcp", "http"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def driver(name: str) -> Driver:
    return load(name)


@pytest.fixture
def listen(driver: Driver, inbox: Inbox) -> Iterator[Callable[..., Listener]]:
    """Start a listener that is closed after the test, and may have let in only whom the test has taken out."""
    started: list[Listener] = []

    def start(credentials: Credentials | Unencrypted, limits: Limits | None = None) -> Listener:
        started.append(driver.listen("127.0.0.1:0", credentials, limits or Limits()))
        started[-1].start(inbox)
        return started[-1]

    yield start
    for listener in started:
        listener.close()
    assert inbox.items == []


def place_of(listener: Listener) -> tuple[str, int]:
    host, _, port = listener.address.rpartition(":")
    return host, int(port)


def expect_honest(driver: Driver, listener: Listener, honest: Credentials, inbox: Inbox) -> float:
    """Dial as a peer that is welcome, and return how many seconds it took to be heard."""
    began = time.monotonic()
    here = driver.dial(listener.address, honest, PATIENT)
    (there,) = inbox.wait(1)
    inbox.items.clear()
    assert isinstance(there, Connection)
    here.write(make(Kind.PING))
    assert there.read().kind == Kind.PING
    here.abort()
    there.abort()
    return time.monotonic() - began


def test_site_of_another_federation_is_refused(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, foreign_kits: Path
) -> None:
    listener = listen(credentials("server"))
    with pytest.raises(RefusedError, match="its certificate is of a foreign authority; check the address"):
        driver.dial(listener.address, Credentials.from_kit(foreign_kits / "site-1"), PATIENT)


def test_certificate_of_another_authority_is_refused_by_the_server(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, foreign_kits: Path
) -> None:
    listener = listen(credentials("server"))
    foreign = Credentials.from_kit(foreign_kits / "site-1")
    mixed = Credentials(credentials("site-1").ca, foreign.certificate, foreign.key)
    with pytest.raises(RefusedError, match=r"certificate\.pem: the certificate is of a foreign authority, not of"):
        driver.dial(listener.address, mixed, PATIENT)


def test_expired_certificate_of_a_site_is_refused(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, kits: Path, tmp_path: Path
) -> None:
    listener = listen(credentials("server"))
    with pytest.raises(RefusedError, match="the certificate expired on"):
        driver.dial(listener.address, reissued(kits, "site-1", tmp_path, NOW - 2 * DAY, NOW - DAY), PATIENT)


def test_expired_certificate_of_the_server_is_refused(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, kits: Path, tmp_path: Path
) -> None:
    listener = listen(reissued(kits, "server", tmp_path, NOW - 2 * DAY, NOW - DAY))
    with pytest.raises(RefusedError, match="its certificate has expired; the coordinator must renew it"):
        driver.dial(listener.address, credentials("site-1"), PATIENT)


def test_site_cannot_play_the_server(driver: Driver, listen: Callable[..., Listener], credentials: Kit) -> None:
    listener = listen(credentials("site-2"))
    with pytest.raises(RefusedError, match="its certificate is not"):
        driver.dial(listener.address, credentials("site-1"), PATIENT)


def test_server_at_another_address_than_its_certificate_says_is_refused(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit
) -> None:
    port = place_of(listen(credentials("server")))[1]
    with contextlib.closing(socket.create_server(("127.0.0.2", 0))) as elsewhere:
        threading.Thread(target=relay, args=(elsewhere, port), daemon=True).start()
        with pytest.raises(RefusedError, match="its certificate is not for this IP address"):
            driver.dial(f"127.0.0.2:{elsewhere.getsockname()[1]}", credentials("site-1"), PATIENT)


def test_plain_peer_is_refused_by_a_listener_with_certificates(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit
) -> None:
    listener = listen(credentials("server"))
    with pytest.raises(ConnectionClosed, match="it hung up; does it expect a certificate, or another driver"):
        driver.dial(listener.address, Unencrypted("site-1"), PATIENT)


def test_peer_with_a_certificate_finds_no_tls_at_a_plain_listener(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit
) -> None:
    listener = listen(Unencrypted("server"))
    with pytest.raises(ConnectionClosed, match="no TLS there"):
        driver.dial(listener.address, credentials("site-1"), PATIENT)


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["grpc", "tcp", "http"])
def test_server_with_another_driver_is_a_closed_connection(
    driver: Driver, name: str, theirs: str, listen: Callable[..., Listener], credentials: Kit
) -> None:
    if theirs == name:
        pytest.skip("the same driver")
    listener = listen(credentials("server"))
    with pytest.raises(ConnectionClosed):
        load(theirs).dial(listener.address, credentials("site-1"), PATIENT)


def test_server_that_never_answers_is_given_up_in_time(driver: Driver, credentials: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(ConnectionClosed, match="no answer"):
            driver.dial(f"127.0.0.1:{silent.getsockname()[1]}", credentials("site-1"), 0.5)
        assert time.monotonic() - began < 3.0


def test_stranger_that_never_finishes_is_ended_in_time(listen: Callable[..., Listener], credentials: Kit) -> None:
    listener = listen(credentials("server"), Limits(handshake_s=0.5))
    with socket.create_connection(place_of(listener), timeout=10) as slow:
        slow.sendall(b"\x16\x03\x01")  # a TLS record that never goes on
        assert ended(slow)


def test_strangers_bytes_are_bounded(name: str, listen: Callable[..., Listener]) -> None:
    if name == "grpc":
        pytest.skip("gRPC bounds headers by itself")
    listener = listen(Unencrypted("server"))
    with socket.create_connection(place_of(listener), timeout=10) as loud:
        with contextlib.suppress(ConnectionError):
            for _ in range(1_000):
                loud.sendall(b"GET /fedbio HTTP/1.1\r\nx: " + b"x" * 10_000)
        assert ended(loud)


def test_strangers_bytes_are_bounded_in_a_tls_handshake_too(listen: Callable[..., Listener], credentials: Kit) -> None:
    listener = listen(credentials("server"))
    sent = 0
    with socket.create_connection(place_of(listener), timeout=10) as loud:
        with contextlib.suppress(ConnectionError):
            loud.sendall(b"\x16\x03\x01\x00\x04\x01\xff\xff\xff")  # a greeting of 16 MB, it says
            for _ in range(1_000):
                loud.sendall(b"\x16\x03\x01\x40\x00" + bytes(1 << 14))
                sent += 1 << 14
        assert ended(loud)
    assert sent < 8 << 20  # what the kernel has taken by then


def test_crowd_of_slow_strangers_keeps_nobody_out(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, inbox: Inbox
) -> None:
    listener = listen(credentials("server"), Limits(handshake_s=2.0))
    with crowd(listener, 200) as sockets:
        for _ in range(3):
            for slow in sockets:
                with contextlib.suppress(OSError):
                    slow.send(b"\x16")
            assert expect_honest(driver, listener, credentials("site-1"), inbox) < 2.0
        for slow in sockets:
            assert ended(slow)


@pytest.mark.parametrize("name", ["tcp", "http"])
def test_oldest_stranger_makes_room_for_the_next(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, inbox: Inbox
) -> None:
    listener = listen(credentials("server"), Limits(handshake_s=60.0, max_handshakes=4))
    with crowd(listener, 20) as sockets:
        eventually(lambda: sum(ended(slow, 0.0) for slow in sockets[:16]) == 16)
        assert not any(ended(slow, 0.0) for slow in sockets[16:])
        assert expect_honest(driver, listener, credentials("site-1"), inbox) < 2.0
        assert ended(sockets[16])


def test_more_peers_than_allowed_are_told_so(
    driver: Driver, listen: Callable[..., Listener], credentials: Kit, inbox: Inbox
) -> None:
    listener = listen(credentials("server"), Limits(max_peers=1))
    here = driver.dial(listener.address, credentials("site-1"), PATIENT)
    (there,) = inbox.wait(1)
    assert isinstance(there, Connection)
    with pytest.raises(ConnectionClosed, match=r"as many peers as it may|limit exceeded"):
        driver.dial(listener.address, credentials("site-2"), PATIENT)
    here.abort()
    there.abort()
    inbox.items.clear()

    def again() -> bool:
        with contextlib.suppress(ConnectionClosed):
            return expect_honest(driver, listener, credentials("site-2"), inbox) > 0
        return False

    eventually(again)


@pytest.mark.parametrize("said", ["", "site 1", "x" * 65, "../x"])
@pytest.mark.parametrize("name", ["tcp", "http"])
def test_plain_name_that_is_none_is_refused(name: str, said: str, listen: Callable[..., Listener]) -> None:
    listener = listen(Unencrypted("server"))
    line = f"fedbio {said}\n"
    head = f"GET /fedbio HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nFedbio-Name: {said}\r\n\r\n"
    with socket.create_connection(place_of(listener), timeout=10) as stranger:
        stranger.sendall((line if name == "tcp" else head).encode())
        assert stranger.recv(100) == b"" or name == "http"


@pytest.mark.parametrize("busy", ["127.0.0.1", "::1"])
def test_port_that_is_busy_at_one_of_two_addresses_is_named(
    driver: Driver, credentials: Kit, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def both(host: str | None, port: int, *args: int, **more: int) -> list[object]:
        if host != "localhost":
            return list(real(host, port, *args, **more))
        return [*real("127.0.0.1", port, *args, **more), *real("::1", port, *args, **more)]

    # whatever this machine's /etc/hosts says
    monkeypatch.setattr(socket, "getaddrinfo", both)
    family = socket.AF_INET6 if ":" in busy else socket.AF_INET
    with socket.create_server((busy, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port} is in use on this machine"):
            driver.listen(f"localhost:{port}", credentials("server"), Limits())


@pytest.mark.parametrize("place", ["127.0.0.1", "[::1]", "localhost", "0.0.0.0", "[::]"])
def test_peers_reach_a_listener_at_every_kind_of_address(driver: Driver, place: str, inbox: Inbox) -> None:
    listener = driver.listen(f"{place}:0", Unencrypted("server"), Limits())
    listener.start(inbox)
    port = listener.address.rpartition(":")[2]
    dialled = {"0.0.0.0": ["127.0.0.1"], "[::]": ["[::1]", "127.0.0.1"]}.get(place, [place])
    for number, host in enumerate(dialled):
        here = driver.dial(f"{host}:{port}", Unencrypted("site-1"), PATIENT)
        there = inbox.wait(number + 1)[number]
        assert isinstance(there, Connection)
        here.abort()
        there.abort()
    listener.close()


def ended(stranger: socket.socket, within_s: float = 10.0) -> bool:
    """Tell whether the other end closes a connection in time."""
    stranger.settimeout(within_s)
    try:
        while stranger.recv(4096):
            pass
    except (TimeoutError, BlockingIOError):
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def crowd(listener: Listener, size: int) -> Iterator[list[socket.socket]]:
    """Open that many connections that say nothing by themselves."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(place_of(listener), timeout=10)) for _ in range(size)]


def relay(listening: socket.socket, port: int) -> None:
    """Pass what arrives at one place on to a port of this machine, and its answers back."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65_536):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)

    with contextlib.suppress(OSError):
        while True:
            near, _ = listening.accept()
            with near, socket.create_connection(("127.0.0.1", port)) as far:
                back = threading.Thread(target=pass_on, args=(far, near), daemon=True)
                back.start()
                pass_on(near, far)
                back.join(2)
