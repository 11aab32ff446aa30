"""Find the proteins that two sites have in common, through a server that must not learn which they are.

One site draws a key and seals it for the other, whose signed introduction it has checked. Each then sends the keyed
digests (HMAC-SHA256) of its proteins' ids, sorted. The server sees how many there are and how many are equal, and
cannot hold them against a list of ids, since it has no key. Each of the two sites can: it has the key, and learns of
any id that it can guess whether the other one has it.

Both sites put the proteins that they share into the order of their ids, so that the batches of an epoch are the same
in every run with the same seed.
"""

from __future__ import annotations

__all__ = ["Meeting", "batches", "common_rows", "digests"]

import hmac
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError, ProtocolError
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.introductions import Statement, federation_of, introduce, read_introduction
from fedbio.federation.sealed import Key, Pair, seal, unseal

DIGEST_BYTES = 16
"""Of the 32 of HMAC-SHA256: two of 2**40 ids are equal by chance once in 2**48 times."""

KEY_BYTES = 32
_PURPOSE = b"fedbio split learning: the key of the digests of ids"


class Meeting:
    """A site's keys for one alignment.

    Parameters
    ----------
    identity : SiteIdentity
    site, job, session : str
    examples : int
        How many rows the site has.
    """

    def __init__(self, identity: SiteIdentity, *, site: str, job: str, session: str, examples: int) -> None:
        self._identity, self._job, self._session = identity, job, session
        self._federation = federation_of(identity)
        self._pair = Pair.make()
        statement = Statement(
            federation=self._federation,
            job=job,
            run=session,
            exchange=0,
            site=site,
            examples=examples,
            key=self._pair.public,
        )
        self.introduction = introduce(statement, identity)

    def draw(self, peer: str, introduction: bytes) -> tuple[bytes, NDArray[np.uint8]]:
        """Return a fresh key, and the same sealed for the other site.

        Raises
        ------
        RefusedError
            If the introduction is not that site's, or not for this alignment.
        """
        key = os.urandom(KEY_BYTES)
        sealed = b"".join(seal([key], self._pair.to(self._public(peer, introduction), _PURPOSE)))
        return key, np.frombuffer(sealed, np.uint8)

    def open(self, peer: str, introduction: bytes, sealed: NDArray[Any]) -> bytes:
        """Return the key that the other site has sealed for this one.

        Raises
        ------
        RefusedError
            If the introduction is not that site's, or not for this alignment.
        ProtocolError
            If the sealed bytes are not what that site has sealed.
        """
        if sealed.dtype != np.uint8 or sealed.ndim != 1:
            raise ProtocolError("the key of the digests did not come as sealed bytes")
        key: Key = self._pair.by(self._public(peer, introduction), _PURPOSE)
        opened = b"".join(unseal([sealed.tobytes()], key))
        if len(opened) != KEY_BYTES:
            raise ProtocolError(f"a key of {len(opened)} bytes for the digests, expected {KEY_BYTES}")
        return opened

    def _public(self, peer: str, introduction: bytes) -> bytes:
        authority = self._identity.authority()
        told = {"federation": self._federation, "job": self._job, "run": self._session, "exchange": 0, "site": peer}
        return read_introduction(introduction, authority, **told).key  # type: ignore[arg-type]


def digests(ids: Sequence[str], key: bytes) -> NDArray[np.uint8]:
    """Return the keyed digests of ids.

    Parameters
    ----------
    ids : sequence of str
    key : bytes

    Returns
    -------
    ndarray, shape (n, 16), dtype=np.uint8
        In the order of `ids`.

    Raises
    ------
    DataError
        If an id is there twice: nobody could say which row is meant.
    """
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise DataError(f"id {twice!r} is there twice among the rows of the script; each protein needs one row")
    content = b"".join(hmac.digest(key, each.encode(), "sha256")[:DIGEST_BYTES] for each in ids)
    return np.frombuffer(content, np.uint8).reshape(-1, DIGEST_BYTES)


def common_rows(ids: Sequence[str], own: NDArray[np.uint8], others: NDArray[Any]) -> NDArray[np.int64]:
    """Return the rows of proteins that the other site has too, in the order of their ids.

    Parameters
    ----------
    ids : sequence of str, length n
    own : ndarray, shape (n, 16), dtype=np.uint8
        Digests of `ids`.
    others : ndarray, shape (m, 16), dtype=np.uint8
        What the other site sent.

    Returns
    -------
    ndarray, shape (k,), dtype=np.int64

    Raises
    ------
    ProtocolError
        If `others` are no digests, or one is there twice.
    """
    if others.dtype != np.uint8 or others.ndim != 2 or others.shape[1] != DIGEST_BYTES:
        raise ProtocolError(
            f"digests of {others.dtype} and shape {others.shape}, expected uint8 and (n, {DIGEST_BYTES})"
        )
    known = {row.tobytes() for row in others}
    if len(known) < len(others):
        raise ProtocolError("the other site has sent a digest twice; each protein needs one row")
    shared = [row for row, digest in enumerate(own) if digest.tobytes() in known]
    return np.array(sorted(shared, key=lambda row: ids[row]), dtype=np.int64)


def batches(rows: int, batch_size: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the batches of an epoch: every row once, in an order of the epoch's own, in batches of even size.

    Parameters
    ----------
    rows : int
    batch_size : int
        The most rows in a batch.
    seed, epoch : int
        Together they decide the order.

    Returns
    -------
    list of ndarray, shape (b,), dtype=np.int64
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return np.array_split(order, -(-rows // batch_size))
