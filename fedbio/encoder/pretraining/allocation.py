"""Hold on to memory that was freed, since the next update needs as much again."""

from __future__ import annotations

__all__ = ["keep_freed_memory"]

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Have glibc give no memory back to the system; does nothing where there is another C library.

    Each large tensor would otherwise be fresh pages, which the system fills with zeros one by one: a third of the time
    of an update on virtual machines.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
