"""Choose how many threads torch computes with, for a while."""

from __future__ import annotations

__all__ = ["torch_threads"]

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[int]:
    """Set torch's threads while the block runs, and yield how many there were.

    Steps on small batches want one: several wait for each other longer than they compute, many times longer on a
    machine that is busy with other sites.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
