"""What the server can check of sealed bytes: that they are bytes, how many, and for whom."""

from __future__ import annotations

__all__ = ["answer_of", "sealed_bytes", "sealed_model"]

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.errors import ProtocolError
from fedbio.federation.model import Result
from fedbio.federation.workflows.study import read_meta
from fedbio.federation.workflows.swarm_words import KEY, MODEL

MAX_KEY_BYTES = 1 << 10
"""What opens a model for one site is 128 bytes."""

S = TypeVar("S", bound=msgspec.Struct)


def sealed_bytes(result: Result, title: str, most: int | None) -> NDArray[Any]:
    """Return the sealed bytes under a name in a result.

    Raises
    ------
    ProtocolError
        If they are no bytes, or more than `most`.
    """
    found = result.model.params.get(title)
    if found is None or found.dtype != np.uint8 or found.ndim != 1 or not len(found):
        raise ProtocolError(f"{result.site} sent no sealed bytes as {title!r}")
    if most is not None and len(found) > most:
        raise ProtocolError(f"{result.site} sent {len(found)} bytes as {title!r}, at most {most} are allowed")
    return found


def sealed_model(result: Result, receivers: Sequence[str], most: int | None) -> dict[str, NDArray[Any]]:
    """Return a sealed model, and what opens it for each receiver; see `sealed_bytes`."""
    found = {MODEL: sealed_bytes(result, MODEL, most)}
    for title in result.model.params:
        if title != MODEL:
            if not title.startswith(KEY) or title.removeprefix(KEY) not in receivers:
                raise ProtocolError(f"{result.site} sealed something as {title!r}, which nobody has asked for")
            found[title] = sealed_bytes(result, title, MAX_KEY_BYTES)
    return found


def answer_of(result: Result, kind: type[S]) -> S | None:
    """Return what a result says; None if it says something else."""
    try:
        return read_meta(result.model.meta, kind)
    except ProtocolError:
        return None
