"""Kinds of what a script logs, by the names of NVIDIA FLARE: numbers are sent, all else is for the site's own log."""

from __future__ import annotations

__all__ = ["AnalyticsDataType", "in_words", "kind_of"]

import enum
from collections.abc import Mapping
from typing import Any


class AnalyticsDataType(enum.Enum):
    """What a script logs; names and values are those of NVFlare's ``nvflare.apis.analytix.AnalyticsDataType``."""

    SCALAR = "SCALAR"
    SCALARS = "SCALARS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    TEXT = "TEXT"
    IMAGE = "IMAGE"
    LOG_RECORD = "LOG_RECORD"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"
    MODEL = "MODEL"
    TAG = "TAG"
    TAGS = "TAGS"
    INIT_DATA = "INIT_DATA"

    @property
    def is_sent(self) -> bool:
        """Whether it is a number, or numbers by name, which the server sees."""
        return self in (self.SCALAR, self.SCALARS, self.METRIC, self.METRICS)


_NOT_KEPT = (AnalyticsDataType.IMAGE, AnalyticsDataType.MODEL, AnalyticsDataType.INIT_DATA)


def kind_of(data_type: Any, value: Any) -> AnalyticsDataType:
    """Return what a script says that it logs; without a word, what the value is.

    Parameters
    ----------
    data_type : AnalyticsDataType, str, another enum with the same values, or None
    value
        What is logged.

    Raises
    ------
    TypeError
        If there is no such kind.
    """
    if data_type is None:
        return AnalyticsDataType.TEXT if isinstance(value, str) else AnalyticsDataType.SCALAR
    name = getattr(data_type, "value", data_type)
    try:
        return AnalyticsDataType(str(name).upper())
    except ValueError as error:
        known = ", ".join(each.value for each in AnalyticsDataType)
        raise TypeError(f"log(): there is no data_type {name!r}; it is one of {known}") from error


def in_words(kind: AnalyticsDataType, value: Any) -> str:
    """Return a value that is not sent as a line for the site's log."""
    if kind in _NOT_KEPT:
        return f"({type(value).__name__}, not kept: only numbers and words are)"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    return str(value)
