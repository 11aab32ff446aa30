"""Which rows two sites have in common: the same at both, by ids that nobody between them can look up."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from fedbio.errors import DataError, FedbioError, ProtocolError, RefusedError
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.split_rows import Meeting, batches, common_rows, digests

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def meeting(federation: Any, site: str, session: str = "s") -> Meeting:
    identity = SiteIdentity(federation.credentials(site))
    return Meeting(identity, site=site, job="split", session=session, examples=3)


def test_both_sites_put_what_they_share_into_the_same_order() -> None:
    ids, others = ["P3", "P1", "P9", "P2"], ["P2", "P7", "P3", "P1"]
    own, theirs = digests(ids, KEY), digests(others, KEY)
    assert [ids[row] for row in common_rows(ids, own, theirs)] == ["P1", "P2", "P3"]
    assert [others[row] for row in common_rows(others, theirs, own)] == ["P1", "P2", "P3"]


def test_digests_tell_nothing_without_their_key() -> None:
    found = digests(["P1"], KEY)
    assert found.shape == (1, 16)
    assert found.tobytes() != hashlib.sha256(b"P1").digest()[:16]
    assert not len(common_rows(["P1"], digests(["P1"], OTHER_KEY), found))


def test_id_that_is_there_twice_is_refused() -> None:
    with pytest.raises(DataError, match="'P1' is there twice"):
        digests(["P1", "P2", "P1"], KEY)


@pytest.mark.parametrize(
    "others",
    [np.zeros((2, 15), np.uint8), np.zeros(16, np.uint8), np.zeros((1, 16), np.float32), np.zeros((2, 16), "u1")],
)
def test_what_are_no_digests_is_refused(others: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="digest"):
        common_rows(["P1"], digests(["P1"], KEY), others)


def test_key_is_sealed_for_the_other_site(federation: Any) -> None:
    first, second = meeting(federation, "site-1"), meeting(federation, "site-2")
    key, sealed = first.draw("site-2", second.introduction)
    assert len(key) == 32
    assert key not in sealed.tobytes()
    assert second.open("site-1", first.introduction, sealed) == key


@pytest.mark.parametrize("session", ["s", "another"])
def test_introduction_of_another_site_or_session_gets_no_key(federation: Any, session: str) -> None:
    first, stranger = meeting(federation, "site-1"), meeting(federation, "site-3", session)
    # a server that puts in a key of its own
    with pytest.raises(RefusedError, match="the introduction of site-2 is refused"):
        first.draw("site-2", stranger.introduction)
    with pytest.raises(RefusedError, match="the introduction of site-2 is refused"):
        first.draw("site-2", meeting(federation, "site-2", "yesterday").introduction)


def test_sealed_key_that_was_changed_does_not_open(federation: Any) -> None:
    first, second = meeting(federation, "site-1"), meeting(federation, "site-2")
    _, sealed = first.draw("site-2", second.introduction)
    changed = sealed.copy()
    changed[-1] ^= 1
    for wrong in (changed, sealed[:-1], sealed.astype(np.float32), np.zeros((2, 2), np.uint8)):
        with pytest.raises(FedbioError):
            second.open("site-1", first.introduction, wrong)


def test_batches_have_every_row_once_in_an_order_of_the_epoch() -> None:
    found = batches(50, 8, seed=7, epoch=3)
    assert sorted(np.concatenate(found)) == list(range(50))
    assert [len(each) for each in found] == [8, 7, 7, 7, 7, 7, 7]
    assert [each.tolist() for each in batches(50, 8, seed=7, epoch=3)] == [each.tolist() for each in found]
    assert np.concatenate(batches(50, 8, seed=7, epoch=4)).tolist() != np.concatenate(found).tolist()
    assert [each.tolist() for each in batches(1, 8, seed=0, epoch=0)] == [[0]]
