"""Hold on to memory that was freed, since the next update needs as much again, and to little else."""

from __future__ import annotations

__all__ = ["keep_freed_memory"]

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""

KEPT_PRODUCTS = "64"
"""Matrix products of a shape that are kept ready; a pack has about twenty."""


def keep_freed_memory() -> None:
    """Have glibc give no memory back to the system, and oneDNN keep few products; call it before the first product.

    Each large tensor would otherwise be fresh pages, which the system fills with zeros one by one: a third of the time
    of an update on virtual machines. oneDNN and PyTorch's layer over it each keep a thousand products ready, about a
    megabyte each; since proteins have all lengths, that would be gigabytes of what is hardly used again.
    """
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, KEPT_PRODUCTS)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
