"""Move frames over one bidirectional gRPC stream of raw bytes with mutual TLS."""

from __future__ import annotations

__all__ = ["GrpcDriver"]

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, TypeVar

# gRPC reads these at import: its own log repeats on stderr what our errors say, and we never fork
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from fedbio.errors import MachineError, SettingsError
from fedbio.transport.credentials import Credentials, Identity, Unencrypted
from fedbio.transport.drivers.addresses import bind, split
from fedbio.transport.drivers.base import Connection, ConnectionClosed, Driver, Lane, Listener, Source
from fedbio.transport.drivers.outbox import Outbox
from fedbio.transport.drivers.tls import diagnose
from fedbio.transport.frames import MAX_FRAME_BYTES, Frame, decode_all, encode
from fedbio.transport.limits import Limits

PATH = "/fedbio.Transport/Exchange"

WELCOME = ("fedbio", "welcome")
"""The metadata that tells the dialling end that it is let in."""

NAME = "fedbio-name"
"""The metadata in which the dialling end says its name where no certificate does."""

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

    pulls = True

    def __init__(
        self, peer: str, address: str, incoming: Iterator[bytes], outbox: Outbox, cancel: Callable[[], Any]
    ) -> None:
        super().__init__(peer, address)
        self._incoming = incoming
        self._outbox = outbox
        self._cancel = cancel

    def _receive(self) -> list[Frame]:
        try:
            return decode_all(next(self._incoming), self.allowed_bytes)
        except StopIteration:
            reason = "closed by the peer"
        except grpc.RpcError as error:
            # the dialling end's errors are calls with details, the listening end's are bare
            details = getattr(error, "details", None)
            reason = (details and details()) or "the connection broke"
        self._outbox.close(reason, drop=True)
        raise ConnectionClosed(self._outbox.reason)

    def write(self, frame: Frame, lane: Lane = Lane.URGENT) -> None:
        self._outbox.put(frame, lane)

    def offer(self, source: Source) -> None:
        self._outbox.offer(source)

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

    def _receive(self) -> list[Frame]:
        try:
            return super()._receive()
        except ConnectionClosed:
            # it waits until the kernel has taken what was being written: on a link that has stalled, perhaps for ever
            threading.Thread(target=self._channel.close, name="fedbio-grpc-close", daemon=True).start()
            raise


class _GrpcListener(Listener):
    def __init__(self, address: str, credentials: Identity, limits: Limits) -> None:
        self._on_connection: Callable[[Connection], None]
        self._proven = isinstance(credentials, Credentials)
        self._server = grpc.server(
            _ThreadPerConnection(),
            handlers=[_Service(self._accept)],
            options=[
                *OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 4),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
                ("grpc.max_connection_idle_ms", int(limits.handshake_s * 1000)),
                ("grpc.max_allowed_incoming_connections", limits.max_peers + limits.max_handshakes),
            ],
            maximum_concurrent_rpcs=limits.max_peers,
        )
        host, port = address.rpartition(":")[0], split(address)[1]
        if port:
            # gRPC is content with one of a host's addresses, and says no word about those that are taken
            for free in bind(address)[0]:
                free.close()
        try:
            if isinstance(credentials, Credentials):
                ca, certificate, key = credentials.read()
                tls = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
                port = self._server.add_secure_port(address, tls)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise MachineError(f"{address} cannot be listened on; check the address") from error
        self.address = f"{host}:{port}"

    def start(self, on_connection: Callable[[Connection], None]) -> None:
        self._on_connection = on_connection
        self._server.start()

    def close(self) -> None:
        self._server.stop(CLOSE_GRACE_S).wait(2 * CLOSE_GRACE_S)

    def _accept(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            name = self._name(context)
        except (SettingsError, UnicodeDecodeError):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "it must name one party")
        outbox = Outbox()
        connection = _GrpcConnection(name, context.peer(), incoming, outbox, context.cancel)
        if not context.add_callback(lambda: outbox.close("the connection broke", drop=True)):
            return iter(())
        context.send_initial_metadata((WELCOME,))
        self._on_connection(connection)
        return _messages(outbox)

    def _name(self, context: grpc.ServicerContext) -> str:
        if self._proven:
            proof: Any = context.auth_context()
            names: list[str] = [name.decode() for name in proof.get("x509_common_name", ())]
        else:
            names = [Unencrypted(str(value)).name for key, value in context.invocation_metadata() if key == NAME]
        if len(names) != 1:
            raise SettingsError(f"names: expected one, found {len(names)}")
        return names[0]


def _messages(outbox: Outbox) -> Iterator[bytes]:
    """Yield what leaves, one gRPC message for all frames that leave together."""
    while (frames := outbox.take()) is not None:
        yield encode(frames)


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

    def listen(self, address: str, credentials: Identity, limits: Limits) -> Listener:
        return _GrpcListener(address, credentials, limits)

    def dial(self, address: str, credentials: Identity, timeout_s: float) -> Connection:
        started = time.monotonic()
        options = [
            *OPTIONS,
            # the server is dialled itself, whatever the environment says; each dial starts afresh
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
        ]
        named: tuple[tuple[str, str], ...] = ()
        if isinstance(credentials, Credentials):
            ca, certificate, key = credentials.read()
            tls = grpc.ssl_channel_credentials(ca, key, certificate)
            channel = grpc.secure_channel(address, tls, options)
        else:
            named = ((NAME, credentials.check()),)
            channel = grpc.insecure_channel(address, options)
        outbox = Outbox()
        call: Any = channel.stream_stream(PATH, None, None)(_messages(outbox), metadata=named)
        timer = threading.Timer(timeout_s, call.cancel)
        timer.daemon = True
        timer.start()
        answer = call.initial_metadata()  # waits until the server lets us in or the attempt fails
        timer.cancel()
        if WELCOME in [tuple(entry) for entry in answer or ()]:
            return _ClientConnection(address, call, outbox, channel)
        code, details = call.code(), call.details()
        outbox.close("not connected", drop=True)
        channel.close()
        if code == grpc.StatusCode.CANCELLED:
            raise ConnectionClosed(f"no answer within {timeout_s:.0f} s")
        if code != grpc.StatusCode.UNAVAILABLE:
            raise ConnectionClosed((details or str(code)).lower())
        left = min(5.0, max(0.5, timeout_s - (time.monotonic() - started)))
        raise ConnectionClosed(diagnose(address, credentials, "h2", left) or details or str(code))
