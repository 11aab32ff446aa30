"""What peers say, written so that a terminal shows it and does not act on it."""

from __future__ import annotations

__all__ = ["LogFormatter", "shown"]

import logging
import re

_ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but for the tabulator and the end of a line."""


def shown(text: str) -> str:
    """Return a text with its control characters written as Python writes them."""
    return _ACTS.sub(lambda found: repr(found[0])[1:-1], text)


class LogFormatter(logging.Formatter):
    """Formats a log of which other parties may have said a part."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, or lines."""
        return shown(super().format(record))
