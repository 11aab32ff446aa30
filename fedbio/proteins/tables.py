"""Take CSV and TSV tables apart: proteins with FLIP's columns, labels by id, or one column by id."""

from __future__ import annotations

__all__ = ["LABELS", "PROTEINS", "read_column", "table_records"]

import csv
import os
from collections.abc import Iterator, Sequence

from fedbio.errors import DataError, FormatError
from fedbio.proteins.fasta import Record
from fedbio.proteins.lines import Line, read_lines
from fedbio.proteins.protein import ReadCounts

# csv's own bound on a cell (131,072 characters) is shorter than some proteins; ours is the bound on a line.
csv.field_size_limit(2**31 - 1)

PROTEINS, LABELS = ("sequence",), ("id", "target")
"""The columns that a table of each kind needs."""

LIKE_TARGET = {"class", "compartment", "label", "localisation", "localization", "location", "subcellular location"}
"""Names of a column that others use for what is ``target`` here."""

_FORMS = {
    PROTEINS: "a table needs the columns sequence, target, set and validation "
    "(FLIP's form, with id if there are names)",
    LABELS: "a table of labels needs the columns id and target (and set, validation); rename the column",
}


def table_records(
    lines: Iterator[Line],
    path: str | os.PathLike[str],
    *,
    needs: tuple[str, ...] = PROTEINS,
    counts: ReadCounts | None = None,
) -> Iterator[Record]:
    """Yield one raw record per row of a table with a header line.

    Parameters
    ----------
    lines : iterator of Line
    path : path-like
        For messages.
    needs : tuple of str
        Columns without which the table is refused: `PROTEINS` or `LABELS`. Read are ``id``, ``sequence``, ``target``,
        ``set`` and ``validation``, in any order and any case; others are passed over.
    counts : ReadCounts, optional
        Told of a column that may have been meant for ``target``.

    Notes
    -----
    Without an ``id`` column the proteins are named ``Sequence0``, ``Sequence1``, ... in the order of the file.
    """
    rows = _rows(lines, path)
    _, header = next(rows)
    columns = {name.strip().lower(): position for position, name in enumerate(header)}
    for name in needs:
        if name not in columns:
            raise FormatError(
                f"{path}:1: no column {name!r} among {', '.join(repr(column) for column in header)}; " + _FORMS[needs]
            )
    if counts is not None and "target" not in columns:
        for name in sorted(LIKE_TARGET.intersection(columns)):
            counts.accepted[f"tables whose column {name!r} is passed over: labels stand in a column 'target'"] += 1

    def cell(row: Sequence[str], name: str) -> str | None:
        position = columns.get(name)
        return row[position].strip() or None if position is not None else None

    for index, (number, row) in enumerate(rows):
        yield Record(
            number,
            (cell(row, "id") or "") if "id" in columns else _numbered(index),
            cell(row, "sequence") or "",
            cell(row, "target"),
            cell(row, "set"),
            cell(row, "validation"),
        )


def read_column(path: str | os.PathLike[str], column: str) -> dict[str, str]:
    """Return one column of a table by protein id; rows with an empty cell are left out.

    Raises
    ------
    DataError
        If the table lacks `column`; the message lists its columns.
    """
    rows = _rows(read_lines(path, ReadCounts()), path)
    _, header = next(rows)
    names = [name.strip().lower() for name in header]
    if column.lower() not in names:
        raise DataError(
            f"{path}:1: no column {column!r} among {', '.join(map(repr, header))}; name another column or another table"
        )
    value = names.index(column.lower())
    key = names.index("id") if "id" in names else None
    return {
        _numbered(index) if key is None else row[key].strip(): row[value].strip()
        for index, (_, row) in enumerate(rows)
        if row[value].strip()
    }


def _numbered(index: int) -> str:
    return f"Sequence{index}"


def _rows(lines: Iterator[Line], path: str | os.PathLike[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and then every row that is not empty, each with its line number."""
    first = next(lines)
    delimiter = max(",\t;", key=first.text.count)

    def texts() -> Iterator[str]:
        yield first.text
        for line in lines:
            yield line.text

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    width = 0
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            width = width or len(row)
            if len(row) != width:
                raise FormatError(
                    f"{path}:{reader.line_num}: {len(row)} cells where the header has {width}; "
                    "a cell that holds the separator needs double quotes around it"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise FormatError(f"{path}:{reader.line_num}: {error}; check the quotes in this row") from error
