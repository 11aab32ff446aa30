"""Hold less of the memory that was freed."""

from __future__ import annotations

__all__ = ["use_one_arena"]

import contextlib
import ctypes

M_ARENA_MAX = -8
"""From glibc's malloc.h."""


def use_one_arena() -> None:
    """Have all threads take memory from one heap; call it before there are many threads.

    glibc gives threads heaps of their own, and what one of them has freed no other can use. Chunks of models are passed
    from thread to thread: a server then holds about 30 MiB more than it needs. One heap is not slower, since most of
    those threads wait for Python's lock anyway. Does nothing where there is another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
