"""What a figure of the report is made of: a drawing, a caption, and the numbers beneath it."""

from __future__ import annotations

__all__ = ["MANY_SITES", "Plate", "Table"]

from dataclasses import dataclass

from fedbio.report.drawing import Drawing

MANY_SITES = 24
"""More sites than this cannot be told apart in a figure: then all of them are drawn as one, and named in the tables."""


@dataclass(frozen=True)
class Table:
    """Numbers as text: a heading for every column, and rows whose first cell names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Plate:
    """A figure as a reader meets it."""

    name: str
    drawing: Drawing
    caption: str
    table: Table
