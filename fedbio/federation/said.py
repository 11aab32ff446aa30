"""What a peer says, made fit for logs and terminals: on one line, of letters that only print, and not too long."""

from __future__ import annotations

__all__ = ["plain", "plain_result"]

import msgspec

from fedbio.federation.model import Result
from fedbio.settings import MOST_LAST_LINES

REASON_CHARACTERS = 2_000
"""The most that a peer's reason is worth."""

LINE_CHARACTERS = 300
"""The most of each of a script's last lines that is kept."""


def plain(text: str, most: int = REASON_CHARACTERS) -> str:
    """Return a text on one line: what does not print is written as Python writes it, what is too much is counted."""
    kept = text[:most]
    if not kept.isprintable():
        kept = "".join(
            letter if letter.isprintable() else repr(letter)[1:-1] for letter in " | ".join(kept.splitlines())
        )
    return kept if len(text) <= most else f"{kept} ... ({len(text) - most} characters more)"


def plain_result(result: Result, site: str) -> Result:
    """Return a result as it came from a site, with words that may be shown."""
    lines = tuple(plain(line, LINE_CHARACTERS) for line in result.last_lines[-MOST_LAST_LINES:])
    return msgspec.structs.replace(result, site=site, reason=plain(result.reason), last_lines=lines)
