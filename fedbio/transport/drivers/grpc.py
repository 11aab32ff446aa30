"""Move frames over one bidirectional gRPC stream of raw bytes with mutual TLS."""

from __future__ import annotations

__all__ = ["GrpcDriver"]

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

# gRPC reads these at import: its own log repeats on stderr what our errors say, and we never fork
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from fedbio.transport.credentials import Credentials
from fedbio.transport.drivers.base import Connection, ConnectionClosed, Driver, Lane, Listener
from fedbio.transport.drivers.outbox import Outbox
from fedbio.transport.drivers.tls import diagnose, why_not_bound
from fedbio.transport.frames import MAX_FRAME_BYTES
from fedbio.transport.limits import Limits

PATH = "/fedbio.Transport/Exchange"

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    # a compressed message could be far larger than it looks
    ("grpc.compression_enabled_algorithms_bitset", 1),
]

T = TypeVar("T")

CLOSE_GRACE_S = 1.0
"""Seconds that frames already written have to leave when a connection or a listener closes."""


class _GrpcConnection(Connection):
    """One stream; gRPC takes its frames from the outbox on a thread of its own."""

    def __init__(
        self, peer: str, address: str, incoming: Iterator[bytes], outbox: Outbox, cancel: Callable[[], Any]
    ) -> None:
        super().__init__(peer, address)
        self._incoming = incoming
        self._outbox = outbox
        self._cancel = cancel

    def _receive(self) -> bytes:
        try:
            return next(self._incoming)
        except StopIteration:
            reason = "closed by the peer"
        except grpc.RpcError as error:
            # the dialling end's errors are calls with details, the listening end's are bare
            details = getattr(error, "details", None)
            reason = (details and details()) or "the connection broke"
        self._outbox.close(reason, drop=True)
        raise ConnectionClosed(self._outbox.reason)

    def write(self, frame: bytes, lane: Lane = Lane.URGENT) -> None:
        self._outbox.put(frame, lane)

    def close(self) -> None:
        self._outbox.close("closed here", drop=False)
        # the other end answers the end of our frames with the end of its own; if it does not, the stream is cut
        timer = threading.Timer(CLOSE_GRACE_S, self._cancel)
        timer.daemon = True
        timer.start()

    def abort(self) -> None:
        self._outbox.close("closed here", drop=True)
        self._cancel()


class _ClientConnection(_GrpcConnection):
    """The dialling end, which owns its channel."""

    def __init__(self, address: str, call: Any, outbox: Outbox, channel: grpc.Channel) -> None:
        super().__init__("", address, call, outbox, call.cancel)
        self._channel = channel

    def _receive(self) -> bytes:
        try:
            return super()._receive()
        except ConnectionClosed:
            self._channel.close()
            raise


class _GrpcListener(Listener):
    def __init__(self, address: str, credentials: Credentials, limits: Limits) -> None:
        self._on_connection: Callable[[Connection], None]
        ca, certificate, key = credentials.read()
        self._server = grpc.server(
            _ThreadPerConnection(),
            handlers=[_Service(self._accept)],
            options=[
                *OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 4),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
            ],
            maximum_concurrent_rpcs=limits.max_peers,
        )
        tls = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
        host, _, port = address.rpartition(":")
        try:
            bound = self._server.add_secure_port(address, tls)
        except RuntimeError as error:
            raise why_not_bound(host.strip("[]"), int(port)) from error
        self.address = f"{host}:{bound}"

    def start(self, on_connection: Callable[[Connection], None]) -> None:
        self._on_connection = on_connection
        self._server.start()

    def close(self) -> None:
        self._server.stop(CLOSE_GRACE_S).wait(2 * CLOSE_GRACE_S)

    def _accept(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        names: Sequence[bytes] = context.auth_context().get("x509_common_name", ())  # type: ignore[assignment]
        if len(names) != 1:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the certificate must name one party")
        outbox = Outbox()
        connection = _GrpcConnection(names[0].decode(), context.peer(), incoming, outbox, context.cancel)
        if not context.add_callback(lambda: outbox.close("the connection broke", drop=True)):
            return iter(())
        context.send_initial_metadata(())  # tells the dialling end that it is let in
        self._on_connection(connection)
        return iter(outbox.take, None)


class _ThreadPerConnection(futures.ThreadPoolExecutor):
    """A thread for each connection, which sends its frames; how many there may be is the server's limit.

    The standard pool would be waited for when the interpreter ends, and hold up a process that forgot to close.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)  # its own queue and threads stay unused

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> futures.Future[T]:
        future: futures.Future[T] = futures.Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="fedbio-grpc-send", daemon=True).start()
        return future


class _Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The one method, on bytes as they are."""

    def __init__(self, accept: Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(accept)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self._handler if handler_call_details.method == PATH else None


class GrpcDriver(Driver):
    """gRPC with mutual TLS: the default."""

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> Listener:
        return _GrpcListener(address, credentials, limits)

    def dial(self, address: str, credentials: Credentials, timeout_s: float) -> Connection:
        started = time.monotonic()
        ca, certificate, key = credentials.read()
        channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(ca, key, certificate),
            options=[
                *OPTIONS,
                # the server is dialled itself, whatever the environment says; each dial starts afresh
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_retries", 0),
            ],
        )
        outbox = Outbox()
        call: Any = channel.stream_stream(PATH, None, None)(iter(outbox.take, None))
        timer = threading.Timer(timeout_s, call.cancel)
        timer.daemon = True
        timer.start()
        call.initial_metadata()  # waits until the server lets us in or the attempt fails
        timer.cancel()
        if call.is_active():
            return _ClientConnection(address, call, outbox, channel)
        code, details = call.code(), call.details()
        outbox.close("not connected", drop=True)
        channel.close()
        if code == grpc.StatusCode.CANCELLED:
            raise ConnectionClosed(f"no answer within {timeout_s:.0f} s")
        left = max(0.5, timeout_s - (time.monotonic() - started))
        raise ConnectionClosed(diagnose(address, credentials, left) or details or str(code))
