"""The HTTP driver against the `websockets` package at the other end, and through a proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from fedbio.errors import ProtocolError
from fedbio.transport import Limits
from fedbio.transport.credentials import Unencrypted
from fedbio.transport.drivers import Connection, ConnectionClosed, Listener, load
from fedbio.transport.frames import MAX_PAYLOAD_BYTES, Kind, encode, make

from .conftest import Inbox

FRAMES = [make(Kind.CHUNK, 1, number, bytes(range(256)) * 4 * number) for number in (0, 1, 64, 1024)]


@pytest.fixture
def listener(inbox: Inbox) -> Iterator[Listener]:
    listener = load("http").listen("127.0.0.1:0", Unencrypted("server"), Limits())
    listener.start(inbox)
    yield listener
    listener.close()


def arrived(inbox: Inbox) -> Connection:
    (connection,) = inbox.wait(1)
    assert isinstance(connection, Connection)
    connection.allowed_bytes = MAX_PAYLOAD_BYTES
    return connection


def test_another_websocket_client_is_understood(listener: Listener, inbox: Inbox) -> None:
    name = {"Fedbio-Name": "site-1"}
    with connect(
        f"ws://{listener.address}/fedbio", additional_headers=name, compression=None, proxy=None, max_size=None
    ) as client:
        there = arrived(inbox)
        assert there.peer == "site-1"
        for frame in FRAMES:
            client.send(encode([frame]))
        client.send(encode(FRAMES[:2]))
        content = encode(FRAMES)
        client.send([content[:5], content[5:10], b"", content[10:]])  # one message in four pieces
        assert [there.read() for _ in range(10)] == [*FRAMES, *FRAMES[:2], *FRAMES]
        there.write(FRAMES[3])
        there.write(FRAMES[0])
        assert client.recv(decode=False) == encode(FRAMES[3:])
        assert client.recv(decode=False) == encode(FRAMES[:1])
        client.ping(b"still there")
        ponged = client.ping(b"and now")
        client.send(encode(FRAMES[:1]))
        there.read()
        there.write(FRAMES[0])
        assert ponged.wait(5)
        assert client.recv(decode=False) == encode(FRAMES[:1])
        there.close()
        with pytest.raises(ConnectionClosedOK):
            client.recv()
    with pytest.raises(ConnectionClosed):
        there.read()


def test_another_websocket_server_is_understood() -> None:
    def echo(server: ServerConnection) -> None:
        for message in server:
            server.send(message)

    with serve(echo, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever).start()
        port = server.socket.getsockname()[1]
        here = load("http").dial(f"127.0.0.1:{port}", Unencrypted("site-1"), 5.0)
        here.allowed_bytes = MAX_PAYLOAD_BYTES
        for frame in FRAMES:
            here.write(frame)
        assert [here.read() for _ in FRAMES] == FRAMES
        here.close()
        with pytest.raises(ConnectionClosed):
            here.read()
        server.shutdown()


@pytest.mark.parametrize(
    "message",
    [
        b"\x82\x05hello",  # without a mask
        b"\xc2\x80mask",  # a reserved bit
        b"\x81\x85masktext!",
        b"\x89\xfe\x00\x7emask" + bytes(126),  # a control frame of 126 bytes
        b"\x83\x80mask",  # a kind that does not exist
        b"\x82\xff" + b"\xff" * 8 + b"mask" + b"x" * 28,  # a message of 2**64 - 1 bytes whose frame is none
    ],
)
def test_malformed_message_is_refused(listener: Listener, inbox: Inbox, message: bytes) -> None:
    host, _, port = listener.address.rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(
            b"GET /fedbio HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nFedbio-Name: site-1\r\n\r\n"
        )
        assert stranger.recv(4096).startswith(b"HTTP/1.1 101 ")
        stranger.sendall(message)
        there = arrived(inbox)
        with pytest.raises(ProtocolError):
            there.read()
        there.abort()


def test_another_path_is_told_where_fedbio_is(listener: Listener) -> None:
    host, _, port = listener.address.rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nFedbio-Name: site-1\r\n\r\n")
        answer = b"".join(iter(lambda: stranger.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"nothing here; fedbio is at /fedbio")


@contextlib.contextmanager
def proxy(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Run a proxy for one connection and yield its port and what it was asked."""
    asked: list[bytes] = []

    def serve_one() -> None:
        near, _ = listening.accept()
        with near:
            asked.append(near.recv(4096))
            near.sendall(answer)
            if b" 200 " not in answer:
                return
            host, port = asked[0].split(b" ")[1].rsplit(b":", 1)
            with socket.create_connection((host.decode(), int(port))) as far:
                back = threading.Thread(target=pass_on, args=(far, near))
                back.start()
                pass_on(near, far)
                back.join(5)

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65_536):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve_one)
        thread.start()
        yield listening.getsockname()[1], asked
        thread.join(5)


def test_proxy_of_the_environment_is_gone_through(
    listener: Listener, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy(b"HTTP/1.1 200 Connection established\r\n\r\n") as (port, asked):
        monkeypatch.setenv("http_proxy", f"http://us%20er:pass@127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        here = load("http").dial(listener.address, Unencrypted("site-1"), 5.0)
        here.write(FRAMES[1])
        assert arrived(inbox).read() == FRAMES[1]
        here.abort()
        arrived(inbox).abort()
    assert asked[0].startswith(f"CONNECT {listener.address} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic dXMgZXI6cGFzcw==\r\n" in asked[0]


def test_proxy_that_refuses_is_named(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n") as (port, _):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(ConnectionClosed, match=rf"proxy 127.0.0.1:{port}: it answered .* 407 "):
            load("http").dial(listener.address, Unencrypted("site-1"), 5.0)


def test_proxy_is_passed_by_where_the_environment_says_so(
    listener: Listener, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    load("http").dial(listener.address, Unencrypted("site-1"), 5.0).abort()
    arrived(inbox).abort()
