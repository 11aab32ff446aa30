"""Draw sites from a seed: the same ones after a restart, and whoever else is here."""

from __future__ import annotations

__all__ = ["sample", "shuffle"]

import hashlib
from collections.abc import Iterable


def sample(sites: Iterable[str], count: int, *, seed: int, number: int) -> tuple[str, ...]:
    """Choose `count` of `sites` for a round; all of them if they are not more.

    Every site gets a ticket from seed, round and its own name, and the lowest tickets win. So the choice does not
    depend on the order of `sites`, and a site that comes or goes changes nothing but its own place: where it was not
    chosen, the choice without it is the same.

    Parameters
    ----------
    sites : iterable of str
    count : int
    seed : int
    number : int
        Of the round.

    Returns
    -------
    tuple of str
        Sorted by name.
    """
    return tuple(sorted(shuffle(sites, seed=seed, number=number)[:count]))


def shuffle(sites: Iterable[str], *, seed: int, number: int) -> tuple[str, ...]:
    """Return `sites` in an order that is drawn anew for every round."""
    return tuple(sorted(sites, key=lambda site: (_ticket(site, seed, number), site)))


def _ticket(site: str, seed: int, number: int) -> bytes:
    # a digest, not a generator's next number: nothing else that is drawn can shift it
    return hashlib.sha256(f"{seed}/{number}/{site}".encode()).digest()
