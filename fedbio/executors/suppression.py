"""Hold small counts of a table back, and enough of the others that nobody finds them by subtraction."""

from __future__ import annotations

__all__ = ["suppress"]

import hashlib
from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def suppress(counts: Mapping[K, int], least: int, *, salt: str = "") -> dict[K, int | None]:
    """Replace by None every count below `least`, zero too, and as many others as hide them.

    Primary suppression takes the small counts out, say `n` of them. One who knows how many proteins the table counts
    in all could still subtract what is left, and see what the small ones are together, or, if there is one, what it
    is. So complementary suppression takes further counts out, in an order that has nothing to do with the counts, until
    those exceed `least` by ``n * (least - 1)`` together; if they never do, all counts of the table are held back.

    Guaranteed where any count is told, even against one who knows the table's total, `least`, and which counts are
    held back as small ones: every small count may be anything from 0 to ``least - 1``, in any combination, since the
    others can make up for it. One who also knows this rule can tell at most that their sum is not above some number,
    but never that one of them is not 0. Of a table that is held back whole nothing is told.

    Not guaranteed: anything against one who knows more than the total. Exact totals of rows or columns, counts of the
    same proteins by other classes or bins or with a lower `least`, or the same table after one protein was added, can
    each be subtracted again. What other jobs tell (`describe` of a study gives exact counts by class and split) is
    not taken into account.

    Parameters
    ----------
    counts : mapping of any to int
        The cells of one table; together they count every protein once.
    least : int
        The smallest count that may be told, at least 1.
    salt : str
        Part of the order: with the site's name, other cells are held back at other sites.

    Returns
    -------
    dict of any to int or None
        The same cells.
    """
    small = {cell for cell, count in counts.items() if count < least}
    hidden = set(small)
    needed = len(small) * (least - 1)
    for cell in sorted(counts.keys() - small, key=lambda each: _order(each, salt)):
        if needed <= 0:
            break  # and if it never is, none is left
        hidden.add(cell)
        needed -= counts[cell] - least
    return {cell: None if cell in hidden else count for cell, count in counts.items()}


def _order(cell: object, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}/{cell!r}".encode()).digest()
