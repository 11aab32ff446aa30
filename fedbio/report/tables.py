"""Read a party's CSV tables row by row, each value with its type and each mistake with its file and line."""

from __future__ import annotations

__all__ = ["read_events", "read_table"]

import csv
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedbio.errors import FormatError

R = TypeVar("R", bound=tuple[Any, ...])

REMEDY = "run the job again, or restore the file from a copy"

_CONVERTERS: dict[type, Callable[[str], Any]] = {str: sys.intern, int: int, float: float}  # few strings, many rows


def read_table(path: Path, row_type: type[R]) -> Iterator[tuple[int, R]]:
    """Yield the rows of a CSV table with their line numbers.

    Parameters
    ----------
    path : Path
        A CSV file whose header names the fields of `row_type`.
    row_type : type of NamedTuple
        Fields of type str, int or float.

    Raises
    ------
    FormatError
        If the file cannot be read as such a table; the message names the line.
    """
    hints = typing.get_type_hints(row_type)
    names = tuple(hints)
    converters = [_CONVERTERS[hint] for hint in hints.values()]
    make = typing.cast("Callable[..., R]", row_type)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if tuple(header) != names:
                raise FormatError(
                    f"{path}:1: expected the columns {','.join(names)}, found {','.join(header) or 'nothing'}; {REMEDY}"
                )
            for cells in reader:
                if len(cells) != len(names):
                    raise FormatError(
                        f"{path}:{reader.line_num}: expected {len(names)} values, found {len(cells)}; {REMEDY}"
                    )
                try:
                    row = make(*[convert(cell) for convert, cell in zip(converters, cells, strict=True)])
                except ValueError:
                    raise _wrong_cell(path, reader.line_num, names, cells, converters) from None
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise FormatError(f"{path}:{reader.line_num + 1}: not a CSV table in UTF-8: {error}; {REMEDY}") from error


def _wrong_cell(
    path: Path, line: int, names: tuple[str, ...], cells: list[str], converters: list[Callable[[str], Any]]
) -> FormatError:
    for name, cell, convert in zip(names, cells, converters, strict=True):
        try:
            convert(cell)
        except ValueError:
            kind = "a whole number" if convert is int else "a number"
            return FormatError(f"{path}:{line}: {name}: expected {kind}, found {cell!r}; {REMEDY}")
    raise AssertionError("every cell converts")


def read_events(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each event's time and its line of JSON; a torn last line, left by a kill, is passed over.

    Raises
    ------
    FormatError
        If a line in the middle is not an event.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=_Event).time, line
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            if number == len(lines):  # no newline after it: the writer was killed in the middle
                return
            raise FormatError(f"{path}:{number}: not an event: {error}; {REMEDY}") from error


class _Event(msgspec.Struct):
    time: str
