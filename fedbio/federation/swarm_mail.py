"""The sealed mail between sites of a swarm: whom a site deals with in one exchange, and what it sends to whom.

An update is sealed for one receiver. A model goes to many: it is sealed once under a fresh content key, and each
receiver gets this key and the SHA-256 of the sealed model, sealed for it alone. The digest matters: every receiver
knows the content key, and without a digest one of them could seal another model for the others.
"""

from __future__ import annotations

__all__ = ["Mail", "SealedModel"]

import hashlib
import hmac
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FormatError, ProtocolError, RefusedError
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.introductions import Statement, federation_of, introduce, read_introduction
from fedbio.federation.model import Parameters
from fedbio.federation.sealed import KEY_BYTES, Key, Pair, opened_size, seal, sealed_size, unseal
from fedbio.tensors import chunks, encoded_size, parse

Bytes = NDArray[np.uint8]

_LENGTH = struct.Struct("<I")
_HEADER_BYTES = 64
"""What comes before the tensors, padded: they stay aligned, and sealed sizes do not depend on a weight's digits."""


class _Header(msgspec.Struct, frozen=True, array_like=True):
    weight: float = 0.0


class SealedModel(NamedTuple):
    """A sealed model, and for each receiver what opens it."""

    model: Bytes
    keys: dict[str, Bytes]


@dataclass(slots=True, kw_only=True)
class Mail:
    """One exchange, seen from one site.

    Parameters
    ----------
    identity : SiteIdentity
    site, job, run : str
    exchange : int
    examples : int
        How many examples the site registers.
    """

    identity: SiteIdentity
    site: str
    job: str
    run: str
    exchange: int
    examples: int
    federation: str = field(init=False)
    introduction: bytes = field(init=False)
    _pair: Pair = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pair = Pair.make()
        self.federation = federation_of(self.identity)
        statement = Statement(
            federation=self.federation,
            job=self.job,
            run=self.run,
            exchange=self.exchange,
            site=self.site,
            examples=self.examples,
            key=self._pair.public,
        )
        self.introduction = introduce(statement, self.identity)

    def read(self, site: str, introductions: Mapping[str, bytes]) -> Statement:
        """Return what another site says of itself in this exchange; `RefusedError` if it does not say so."""
        if site not in introductions or site == self.site:
            raise RefusedError(f"the server sent no introduction of {site}")
        return read_introduction(
            introductions[site],
            self.identity.authority(),
            federation=self.federation,
            job=self.job,
            run=self.run,
            exchange=self.exchange,
            site=site,
        )

    def seal_update(self, params: Parameters, weight: float, number: int, to: Statement) -> Bytes:
        """Return a site's update of the model of a round, sealed for the site that aggregates."""
        return _sealed(_plain(params, weight), self._key_to(to, "update", number), _plain_size(params))

    def open_update(self, sealed: Bytes, number: int, by: Statement) -> tuple[Parameters, float]:
        """Return the update that a site has sealed for this one, and its weight.

        Raises
        ------
        ProtocolError
            If it is anything else.
        """
        return _parsed(_opened(sealed, self._key_by(by, "update", number)))

    def seal_model(self, params: Parameters, number: int, to: Iterable[Statement]) -> SealedModel:
        """Return the model of a round, sealed for several sites."""
        secret = os.urandom(KEY_BYTES)
        model = _sealed(_plain(params, 0.0), self._content(secret, number), _plain_size(params))
        note = secret + hashlib.sha256(model.data).digest()
        keys = {each.site: _sealed([note], self._key_to(each, "key", number), len(note)) for each in to}
        return SealedModel(model, keys)

    def open_model(self, model: Bytes, key: Bytes, number: int, by: Statement) -> Parameters:
        """Return the model of a round that a site has sealed for this one and others; see `open_update`."""
        note = bytes(_opened(key, self._key_by(by, "key", number)))
        if len(note) != KEY_BYTES + hashlib.sha256().digest_size:
            raise ProtocolError(f"{by.site} sealed {len(note)} bytes instead of a key; do all sites run one release?")
        if not hmac.compare_digest(hashlib.sha256(model.data).digest(), note[KEY_BYTES:]):
            raise ProtocolError(f"the model is not the one that {by.site} sealed")
        return _parsed(_opened(model, self._content(note[:KEY_BYTES], number)))[0]

    def _key_to(self, to: Statement, purpose: str, number: int) -> Key:
        return self._pair.to(to.key, *self._context(purpose, number, self.site, to.site))

    def _key_by(self, by: Statement, purpose: str, number: int) -> Key:
        return self._pair.by(by.key, *self._context(purpose, number, by.site, self.site))

    def _content(self, secret: bytes, number: int) -> Key:
        # the digest beside the secret says who sealed it
        return Key.of(secret, *self._context("model", number))

    def _context(self, purpose: str, number: int, *sites: str) -> list[bytes]:
        fields = (purpose, self.federation, self.job, self.run, str(self.exchange), str(number), *sites)
        return [field.encode() for field in fields]


def _plain_size(params: Parameters) -> int:
    return _HEADER_BYTES + encoded_size(params)


def _plain(params: Parameters, weight: float) -> Iterator[memoryview]:
    header = msgspec.msgpack.encode(_Header(weight))
    yield memoryview((_LENGTH.pack(len(header)) + header).ljust(_HEADER_BYTES, b"\0"))
    yield from chunks(params)


def _parsed(plain: bytearray) -> tuple[Parameters, float]:
    view = memoryview(plain)
    try:
        if len(plain) < _HEADER_BYTES:
            raise FormatError(f"{len(plain)} bytes are too few")
        (length,) = _LENGTH.unpack(view[: _LENGTH.size])
        header = msgspec.msgpack.decode(view[_LENGTH.size : min(_LENGTH.size + length, _HEADER_BYTES)], type=_Header)
        return parse(view[_HEADER_BYTES:]), header.weight
    except (FormatError, msgspec.MsgspecError) as error:
        raise ProtocolError(f"it opens, but is not a model: {error}; do all sites run one release?") from error


def _sealed(pieces: Iterable[Any], key: Key, size: int) -> Bytes:
    """Return the sealed form of `size` bytes, filled chunk by chunk into one array of known length."""
    out = np.empty(sealed_size(size), np.uint8)
    begin = 0
    for chunk in seal(pieces, key):
        out[begin : begin + len(chunk)] = np.frombuffer(chunk, np.uint8)
        begin += len(chunk)
    assert begin == len(out)
    return out


def _opened(sealed: Bytes, key: Key) -> bytearray:
    """Return what was sealed; nothing of it if it is not whole."""
    out = bytearray(opened_size(len(sealed)))
    begin = 0
    for chunk in unseal([sealed.data], key):
        out[begin : begin + len(chunk)] = chunk
        begin += len(chunk)
    return out
