"""Seal bytes for one receiver: chunks of 1 MiB under AES-256-GCM, with a key that both ends derive by X25519.

The form of sealed bytes: `MAGIC`, a random salt of 32 bytes, then the chunks, each followed by its tag of 16 bytes.
Every chunk but the last has exactly `CHUNK_BYTES`; nothing at all is one empty chunk. A chunk's nonce is its number,
and its number and whether it is the last one are authenticated with it: the STREAM construction of Hoang, Reyhanitabar,
Rogaway and Vizár 2015, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance". What is cut short,
longer, reordered or doubled does not open, and no chunk is given out that was not authenticated.

The salt gives every stream a key of its own, so that no nonce is ever used twice, also when the same two ends seal
twice. Who seals for whom, and what, goes into the derivation of the key: bytes that were sealed for another receiver,
by another sender, in the other direction, or in another round, do not open.
"""

from __future__ import annotations

__all__ = ["CHUNK_BYTES", "OVERHEAD_BYTES", "Key", "Pair", "opened_size", "seal", "sealed_size", "unseal"]

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedbio.errors import ProtocolError, RefusedError
from fedbio.tensors.layout import gather

MAGIC = b"fedbio sealed 1\n"
SALT_BYTES, TAG_BYTES, KEY_BYTES = 32, 16, 32
CHUNK_BYTES = 1 << 20
"""Bytes in each chunk but the last, before it is sealed."""

_HEAD_BYTES = len(MAGIC) + SALT_BYTES
OVERHEAD_BYTES = _HEAD_BYTES + TAG_BYTES
"""What sealed bytes are longer by, if they are one chunk; the least that there can be."""

_NONCE = struct.Struct(">4xQ")
_ASSOCIATED = struct.Struct(">QB")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Key:
    """What a stream's key is derived from.

    Parameters
    ----------
    secret : bytes
        At least 32 bytes that only the two ends know.
    context : bytes
        What the secret is used for; both ends must mean the same.
    """

    secret: bytes
    context: bytes

    def __repr__(self) -> str:
        return "Key(...)"

    @classmethod
    def of(cls, secret: bytes, *context: bytes) -> Self:
        """Return the key of a secret for what several fields say together."""
        return cls(secret, _join(*context))

    def cipher(self, salt: bytes) -> AESGCM:
        """Return the cipher of the one stream that has this salt."""
        return AESGCM(HKDF(hashes.SHA256(), KEY_BYTES, salt, _join(MAGIC, self.context)).derive(self.secret))


@dataclass(frozen=True, slots=True)
class Pair:
    """A site's ephemeral X25519 key pair; it is never written anywhere."""

    private: X25519PrivateKey

    @classmethod
    def make(cls) -> Pair:
        """Return a fresh pair."""
        return cls(X25519PrivateKey.generate())

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self.private.public_key().public_bytes_raw()

    def to(self, peer: bytes, *context: bytes) -> Key:
        """Return the key for what is sealed here for the owner of the public half `peer`.

        Raises
        ------
        RefusedError
            If `peer` is no public half, or one that gives a secret that everybody knows.
        """
        return Key.of(self._agree(peer), self.public, peer, *context)

    def by(self, peer: bytes, *context: bytes) -> Key:
        """Return the key for what the owner of the public half `peer` has sealed for this pair; see `to`."""
        return Key.of(self._agree(peer), peer, self.public, *context)

    def _agree(self, peer: bytes) -> bytes:
        try:
            return self.private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            raise RefusedError(
                "not a public key (X25519) that a secret can be agreed with; nothing is sealed for it"
            ) from error


def sealed_size(size: int) -> int:
    """Return how many bytes `size` bytes become."""
    return _HEAD_BYTES + size + max(1, -(-size // CHUNK_BYTES)) * TAG_BYTES


def opened_size(size: int) -> int:
    """Return how many bytes are in `size` sealed ones.

    Raises
    ------
    ProtocolError
        If no bytes become so many.
    """
    body = size - _HEAD_BYTES
    found = body - max(1, -(-body // (CHUNK_BYTES + TAG_BYTES))) * TAG_BYTES
    if found < 0 or sealed_size(found) != size:
        raise ProtocolError(f"{size} bytes are no whole sealed message")
    return found


def seal(pieces: Iterable[Buffer], key: Key) -> Iterator[bytes]:
    """Yield the sealed form of bytes that come in pieces of any size; one chunk of it is in memory at a time.

    Parameters
    ----------
    pieces : iterable of bytes-like
    key : Key
    """
    salt = os.urandom(SALT_BYTES)
    cipher = key.cipher(salt)
    yield MAGIC + salt
    for number, chunk, last in _numbered(pieces, CHUNK_BYTES):
        yield cipher.encrypt(_NONCE.pack(number), chunk, _ASSOCIATED.pack(number, last))


def unseal(pieces: Iterable[Buffer], key: Key) -> Iterator[bytes]:
    """Yield what was sealed, each chunk after it was authenticated; one chunk is in memory at a time.

    The caller must not use what came as a whole before the iterator has ended: the end may be missing.

    Parameters
    ----------
    pieces : iterable of bytes-like
        In pieces of any size.
    key : Key

    Raises
    ------
    ProtocolError
        If the bytes are not what was sealed with this key, whole and in order.
    """
    rest = _without_head(pieces)
    head = next(rest)
    if head[: len(MAGIC)] != MAGIC:
        raise ProtocolError("not a sealed message of this version; do both ends run one release?")
    cipher = key.cipher(bytes(head[len(MAGIC) :]))
    for number, chunk, last in _numbered(rest, CHUNK_BYTES + TAG_BYTES):
        try:
            yield cipher.decrypt(_NONCE.pack(number), chunk, _ASSOCIATED.pack(number, last))
        except (InvalidTag, ValueError) as error:
            raise ProtocolError(
                f"chunk {number} does not open: it is damaged, cut, of another place, or was sealed by another, for "
                "another, or in another round"
            ) from error


def _without_head(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """Yield the head, whole, then the rest in the pieces that it comes in."""
    head, rest = bytearray(), iter(pieces)
    for piece in rest:
        view = memoryview(piece).cast("B")
        taken = _HEAD_BYTES - len(head)
        head += view[:taken]
        if len(head) == _HEAD_BYTES:
            yield head
            yield view[taken:]
            yield from rest
            return
    raise ProtocolError(f"{len(head)} bytes are too few for a sealed message")


def _numbered(pieces: Iterable[Buffer], size: int) -> Iterator[tuple[int, Buffer, bool]]:
    """Yield chunks of `size` with their numbers and whether each is the last one, which alone may be shorter."""
    chunks: Iterator[Buffer] = gather((memoryview(piece).cast("B") for piece in pieces), size)
    number, chunk = 0, next(chunks, b"")
    for following in chunks:
        yield number, chunk, False
        number, chunk = number + 1, following
    yield number, chunk, True


def _join(*fields: bytes) -> bytes:
    """Return fields as one, so that other fields never give the same."""
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)
