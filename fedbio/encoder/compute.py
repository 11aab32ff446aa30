"""Compute the rows that are not there yet, pack after pack, on one device."""

from __future__ import annotations

__all__ = ["compute"]

from collections.abc import Callable

from fedbio.embeddings import Parts
from fedbio.encoder.inference import Inference
from fedbio.encoder.work import Work


def compute(
    inference: Inference,
    work: Work,
    parts: Parts,
    advance: Callable[[int], None],
    *,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Compute the packs whose rows are from `first` to `last` and not in the parts.

    Parameters
    ----------
    inference : Inference
    work : Work
    parts : Parts
        Holds whole packs; a Ctrl-C leaves all that were computed there.
    advance : callable
        Is told of residues, computed now or earlier.
    first, last : int
        Borders of packs; by default all rows.
    """
    last = work.rows if last is None else last
    try:
        for number, begin, end, residues in work.block_rows():
            if end <= first or begin >= last:
                continue
            if first <= begin and end <= last and parts.holds(begin, end):
                advance(residues)
                continue
            block = work.block(number)
            missing = []
            for pack, start, stop, seen in block.packs():
                if first <= start < last:
                    if parts.holds(start, stop):
                        advance(seen)
                    else:
                        missing.append((pack, start, seen))
            numbers = [pack for pack, *_ in missing]
            computed = inference.packs(block.sequences, block.plan, numbers)
            for (_, start, seen), vectors in zip(missing, computed, strict=True):
                parts.append(start, vectors)
                advance(seen)
    except KeyboardInterrupt:
        parts.flush()
        raise
    parts.flush()
