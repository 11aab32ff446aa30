"""Bare loops that move bytes from one process to another, with nothing of ours in between: the limits.

Every loop sends a blob in memory in chunks of 1 MiB, each behind a header of 28 bytes, and waits for the receiver's
word that it has all. With checks, both ends compute what our streams compute: the CRC32 of each chunk and the BLAKE3
digest of the whole. The functions run in the processes of `_processes.Party`: ``listen`` and ``serve`` at the server,
``dial`` and the loops at the site.
"""

from __future__ import annotations

__all__ = [
    "CHUNK_BYTES",
    "copy_file",
    "grpc_dial",
    "grpc_listen",
    "grpc_loop",
    "grpc_times",
    "make_blob",
    "socket_dial",
    "socket_listen",
    "socket_loop",
]

import os
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3
from isal.isal_zlib import crc32

CHUNK_BYTES = 1 << 20
HEADER = struct.Struct("<24xI")
PATH = "/bare.Loop/Exchange"
GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),
    ("grpc.max_send_message_length", 2 * CHUNK_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),
]
COMMAND = struct.Struct("<4sQ?")
"""What the server shall do: take bytes, give bytes, or echo; how many; with or without checks."""
DIGEST_BYTES = 32


def make_blob(state: dict[str, Any], size: int) -> None:
    """Keep a blob of that size in memory, ready to be sent."""
    if len(state.get("blob", b"")) != size:
        block = os.urandom(min(size, 16 << 20))
        blob = bytearray(size)
        for begin in range(0, size, len(block)):
            blob[begin : begin + len(block)] = block[: size - begin]
        state["blob"] = memoryview(blob)


def chunks(blob: memoryview, checks: bool) -> Iterator[tuple[bytes, memoryview | bytes]]:
    """Yield headers and chunks, then the digest of the whole."""
    digest = blake3()
    for begin in range(0, len(blob), CHUNK_BYTES):
        chunk = blob[begin : begin + CHUNK_BYTES]
        crc = 0
        if checks:
            crc = crc32(chunk)  # first: it brings the chunk into the cache in order, BLAKE3 reads it in strides
            digest.update(chunk)
        yield HEADER.pack(crc), chunk
    yield HEADER.pack(0), digest.digest()


class Check:
    """Sums and hashes what arrives."""

    def __init__(self, size: int, checks: bool) -> None:
        self._left = size
        self._digest = blake3() if checks else None

    def take(self, header: bytes | memoryview, chunk: memoryview) -> bool:
        """Return whether that was all."""
        if self._left <= 0:
            assert self._digest is None or self._digest.digest() == chunk
            return True
        self._left -= len(chunk)
        if self._digest is not None:
            assert HEADER.unpack(header) == (crc32(chunk),)
            self._digest.update(chunk)
        return False


# gRPC: one bidirectional stream of raw bytes, mutual TLS


def _pems(kit: str) -> tuple[bytes, bytes, bytes]:
    folder = Path(kit)
    return tuple((folder / name).read_bytes() for name in ("ca.pem", "certificate.pem", "private.key"))  # type: ignore[return-value]


def grpc_listen(state: dict[str, Any], kit: str, options: tuple[tuple[str, int], ...] = (), *, workers: int = 2) -> int:
    """Serve the loops; return the port."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from concurrent import futures

    import grpc

    def exchange(incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        what, size, checks = COMMAND.unpack(next(incoming))
        if what == b"take":
            _grpc_take(incoming, size, checks)
            yield b"done"
        elif what == b"give":
            make_blob(state, size)
            yield from map(b"".join, chunks(state["blob"], checks))
            next(incoming)
        else:
            yield b"ready"
            yield from incoming

    class Service(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(exchange)

    ca, certificate, key = _pems(kit)
    server = grpc.server(futures.ThreadPoolExecutor(workers), handlers=[Service()], options=[*GRPC_OPTIONS, *options])
    port: int = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)], ca, True))
    server.start()
    state["grpc server"] = server
    return port


def grpc_dial(state: dict[str, Any], kit: str, port: int, options: tuple[tuple[str, int], ...] = ()) -> None:
    """Connect to `grpc_listen`."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    ca, certificate, key = _pems(kit)
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    state["grpc channel"] = grpc.secure_channel(f"127.0.0.1:{port}", credentials, [*GRPC_OPTIONS, *options])


def _grpc_take(incoming: Iterator[bytes], size: int, checks: bool) -> None:
    check = Check(size, checks)
    for message in incoming:
        view = memoryview(message)
        if check.take(view[: HEADER.size], view[HEADER.size :]):
            return


def grpc_loop(state: dict[str, Any], size: int, *, upwards: bool, checks: bool) -> float:
    """Move `size` bytes; return the seconds."""
    stream = state["grpc channel"].stream_stream(PATH, None, None)
    if upwards:
        make_blob(state, size)

        def leaving() -> Iterator[bytes]:
            yield COMMAND.pack(b"take", size, checks)
            yield from map(b"".join, chunks(state["blob"], checks))

        started = time.perf_counter()
        for _ in stream(leaving()):
            pass
        return time.perf_counter() - started
    words: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    words.put(COMMAND.pack(b"give", size, checks))
    started = time.perf_counter()
    arriving = stream(iter(words.get, None))
    _grpc_take(arriving, size, checks)
    words.put(b"done")
    words.put(None)
    for _ in arriving:
        pass
    return time.perf_counter() - started


def grpc_times(state: dict[str, Any], body: bytes, count: int) -> list[float]:
    """Send a small message and wait for its echo, one after the other; return the seconds of each."""
    words: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    words.put(COMMAND.pack(b"echo", 0, False))
    arriving = state["grpc channel"].stream_stream(PATH, None, None)(iter(words.get, None))
    next(arriving)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        words.put(body)
        next(arriving)
        times.append(time.perf_counter() - started)
    words.put(None)
    return times


# sockets: TLS or plain, into one buffer that is used again


def _context(kit: str, purpose: int) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    folder = Path(kit)
    context.load_cert_chain(folder / "certificate.pem", folder / "private.key")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def socket_listen(state: dict[str, Any], kit: str, *, tls: bool, ciphers: str | None = None) -> int:
    """Serve the loops on one connection; return the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        link, _ = listener.accept()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            link = _context(kit, ssl.PROTOCOL_TLS_SERVER).wrap_socket(link, server_side=True)
        buffer = memoryview(bytearray(HEADER.size + CHUNK_BYTES))
        command = memoryview(bytearray(COMMAND.size))
        while _fill(link, command):
            what, size, checks = COMMAND.unpack(command)
            if what == b"take":
                _socket_take(link, buffer, size, checks)
                link.sendall(b"done")
            elif what == b"give":
                make_blob(state, size)
                _socket_give(link, state["blob"], checks)
                _fill(link, command[:4])

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def socket_dial(state: dict[str, Any], kit: str, port: int, *, tls: bool) -> None:
    """Connect to `socket_listen`."""
    link = socket.create_connection(("127.0.0.1", port))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls:
        link = _context(kit, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(link, server_hostname="127.0.0.1")
    state["socket", tls] = link


def _fill(link: socket.socket, view: memoryview) -> bool:
    filled = 0
    while filled < len(view):
        count = link.recv_into(view[filled:])
        if count == 0:
            return False
        filled += count
    return True


def _socket_give(link: socket.socket, blob: memoryview, checks: bool) -> None:
    for header, chunk in chunks(blob, checks):
        link.sendall(header)
        link.sendall(chunk)


def _socket_take(link: socket.socket, buffer: memoryview, size: int, checks: bool) -> None:
    check = Check(size, checks)
    header = buffer[: HEADER.size]
    for begin in range(0, size, CHUNK_BYTES):
        _fill(link, header)
        chunk = buffer[HEADER.size :][: min(CHUNK_BYTES, size - begin)]
        _fill(link, chunk)
        check.take(header, chunk)
    digest = buffer[: HEADER.size + DIGEST_BYTES]
    _fill(link, digest)
    check.take(digest[: HEADER.size], digest[HEADER.size :])


def socket_loop(state: dict[str, Any], size: int, *, tls: bool, upwards: bool, checks: bool) -> float:
    """Move `size` bytes; return the seconds."""
    link = state["socket", tls]
    if upwards:
        make_blob(state, size)
    started = time.perf_counter()
    link.sendall(COMMAND.pack(b"take" if upwards else b"give", size, checks))
    if upwards:
        _socket_give(link, state["blob"], checks)
        _fill(link, memoryview(bytearray(4)))
    else:
        buffer = state.setdefault("buffer", memoryview(bytearray(HEADER.size + CHUNK_BYTES)))
        _socket_take(link, buffer, size, checks)
        link.sendall(b"done")
    return time.perf_counter() - started


# disk


def copy_file(state: dict[str, Any], source: str, target: str, *, safe: bool) -> float:
    """Copy a file chunk by chunk; return the seconds, with those until it is safe on the disk if asked to."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    started = time.perf_counter()
    with open(source, "rb", buffering=0) as reading, open(target, "wb", buffering=0) as writing:
        while count := reading.readinto(buffer):
            writing.write(buffer[:count])
        if safe:
            os.fdatasync(writing.fileno())
    seconds = time.perf_counter() - started
    Path(target).unlink()
    return seconds
