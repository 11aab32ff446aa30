"""A site's end of averaging in lockstep: it sends its part when called, and adopts a mean once that is committed."""

from __future__ import annotations

__all__ = ["LockstepSite"]

import logging
import threading
from collections.abc import Callable
from typing import Any

from fedbio.errors import FedbioError, ProtocolError, TransportError
from fedbio.federation import messages
from fedbio.federation.messages import Exchange, pack, unpack
from fedbio.transport import Opening, Payload, Received, Sink

log = logging.getLogger(__name__)


class LockstepSite:
    """Register `sink` for the topic `messages.MEAN`, and pass it the messages that arrive.

    A mean may take as long as the slowest site's part: this end's `Limits.idle_s` should be longer than the server's
    `resume_s` and `idle_s` together.

    Parameters
    ----------
    send : callable
        Sends to the server: topic, body, payload; raises `TransportError`.
    part : callable
        Returns what this site puts into an exchange, a model in the safetensors layout: a `TensorPayload`, or any
        other whose chunks may be made on the way. Called anew for each attempt; raises `FedbioError` if there is none.
    store : callable
        Returns where a mean goes while it arrives, given its exchange and its bytes.
    adopt : callable
        Given an exchange and what the sink has returned, once the mean counts.

    Examples
    --------
    A site whose model is in memory::

        site = LockstepSite(
            send=lambda topic, body, payload: endpoint.send(topic, body, payload),
            part=lambda exchange: TensorPayload(trained),
            store=lambda exchange, size: MemorySink(size),
            adopt=lambda exchange, mean: model.update(mean.tensors()),
        )
    """

    def __init__(
        self,
        send: Callable[[str, bytes, Payload | None], object],
        *,
        part: Callable[[Exchange], Payload],
        store: Callable[[Exchange, int], Sink],
        adopt: Callable[[Exchange, Any], None],
    ) -> None:
        self._send, self._part, self._store, self._adopt = send, part, store, adopt
        self._sending = threading.Lock()
        self._called = Exchange("", 0)
        self._means: dict[Exchange, Any] = {}
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        """Whether a mean is here that may come to count."""
        return bool(self._means)

    def sink(self, opening: Opening) -> Sink:
        """Return where a mean goes."""
        exchange = unpack(Exchange, opening.body)
        if opening.size is None:
            raise ProtocolError("a mean of unknown size")
        return _MeanSink(self._store(exchange, opening.size), lambda mean: self._keep(exchange, mean))

    def take(self, received: Received) -> bool:
        """Deal with a message, on the thread that brings it; return False if it is none of an exchange."""
        if received.topic == messages.CALL:
            self._answer(unpack(Exchange, received.body))
        elif received.topic == messages.COMMIT:
            self._commit(unpack(Exchange, received.body))
        return received.topic in (messages.CALL, messages.MEAN, messages.COMMIT)

    def _keep(self, exchange: Exchange, mean: Any) -> None:
        with self._lock:
            # whatever came before was not committed, or is adopted
            self._means = {exchange: mean}

    def _commit(self, exchange: Exchange) -> None:
        with self._lock:
            held = exchange in self._means
            mean = self._means.pop(exchange, None)
        if held:
            self._adopt(exchange, mean)
        else:
            log.warning("a mean counts that this process does not hold round=%d", exchange.round)

    def _answer(self, exchange: Exchange) -> None:
        """Send this site's part; one at a time, and only for the newest call."""
        with self._lock:
            self._called = exchange
        with self._sending:
            if exchange is not self._called:
                return
            try:
                payload = self._part(exchange)
            except FedbioError as error:
                log.warning("no part for an exchange reason=%s", error)
                payload = None
            try:
                self._send(messages.PART, pack(exchange), payload)
            except TransportError as error:
                # the server has noticed it too: it calls again, or does without this site
                log.info("part not taken attempt=%d reason=%s", exchange.attempt, error)


class _MeanSink(Sink):
    """Passes everything on, and says when the mean is whole: before its sender is told so, and can commit it."""

    def __init__(self, sink: Sink, keep: Callable[[Any], None]) -> None:
        self._sink, self._keep = sink, keep

    def write(self, chunk: memoryview) -> None:
        self._sink.write(chunk)

    def finish(self) -> Any:
        mean = self._sink.finish()
        self._keep(mean)
        return mean

    def abort(self) -> None:
        self._sink.abort()
