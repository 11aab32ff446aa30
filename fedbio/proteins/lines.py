"""Read text files line by line, plain or gzip, and name what is not text.

Memory stays bounded whatever the file: a line may hold `MAX_LINE_BYTES`, and a gzip file may not expand to more than
`MAX_EXPANSION` times its size (proteins reach 2 to 20; a decompression bomb reaches 1,000).
"""

from __future__ import annotations

__all__ = ["MAX_EXPANSION", "MAX_LINE_BYTES", "Line", "read_lines"]

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from fedbio.errors import DataError, FormatError
from fedbio.proteins.protein import ReadCounts

MAX_LINE_BYTES = 16 * 2**20
MAX_EXPANSION = 200
EXPANSION_FLOOR_BYTES = 64 * 2**20
"""Below this a file is read whatever its ratio: long runs of one letter compress a thousandfold."""

HEAD_BYTES = 4096

FOREIGN_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)", "unpack it, or save the sheet as CSV"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it with 'xz -dk'"),
    (b"BZh", "a bzip2 file", "unpack it with 'bzip2 -dk'"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with 'zstd -d'"),
    (b"\x89HDF", "an HDF5 file", "give the sequences, not the embeddings"),
    (b"%PDF", "a PDF file", "give the sequences as FASTA or CSV"),
)


class Line(NamedTuple):
    """A line without its end, and its number, counted from 1."""

    number: int
    text: str


def read_lines(path: str | os.PathLike[str], counts: ReadCounts) -> Iterator[Line]:
    """Yield the lines of a UTF-8 text file, plain or gzip (one member or several), told apart by content.

    Parameters
    ----------
    path : path-like
    counts : ReadCounts
        ``accepted`` receives Windows line ends, a byte order mark and a missing newline at the end.

    Raises
    ------
    DataError
        If the file is missing, a folder, empty or not readable.
    FormatError
        If it is not text, not UTF-8, or a truncated, damaged or hostile gzip file; with the line where there is one.
    """
    file_path = Path(path)
    try:
        with open(file_path, "rb") as raw:
            head = raw.read(HEAD_BYTES)
            raw.seek(0)
            if head.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield from _unpacked_lines(cast("BinaryIO", unpacked), file_path, counts)
            else:
                yield from _lines(raw, file_path, counts, limit=None)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder; name a file in it") from error
    except PermissionError as error:
        raise DataError(f"{path}: may not be read by this user; change its permissions") from error


def _unpacked_lines(unpacked: BinaryIO, path: Path, counts: ReadCounts) -> Iterator[Line]:
    limit = max(EXPANSION_FLOOR_BYTES, MAX_EXPANSION * path.stat().st_size)
    try:
        yield from _lines(unpacked, path, counts, limit=limit)
    except EOFError as error:
        raise FormatError(f"{path}: the gzip file ends too early; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path}: the gzip file is damaged ({error}); copy or download it again") from error


def _lines(stream: BinaryIO, path: Path, counts: ReadCounts, *, limit: int | None) -> Iterator[Line]:
    number = expanded = 0
    raw = b""
    while raw_next := stream.readline(MAX_LINE_BYTES + 1):
        raw = raw_next
        number += 1
        expanded += len(raw)
        if number == 1:
            head = raw[:HEAD_BYTES]
            _refuse_foreign(head, path)
            if head.startswith(b"\xef\xbb\xbf"):
                counts.accepted["byte order mark"] += 1
                raw = raw[3:]
        if len(raw) > MAX_LINE_BYTES:
            raise FormatError(
                f"{path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes is no protein; check what file this is"
            )
        if limit is not None and expanded > limit:
            raise FormatError(
                f"{path}: the gzip file expands to more than {limit:,} bytes, {MAX_EXPANSION} times its size, "
                "which no set of proteins does; unpack it by hand if you trust it"
            )
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{path}:{number}: byte 0x{raw[error.start]:02X} is not UTF-8 text; save the file as UTF-8"
            ) from error
        if text.endswith("\r\n"):
            counts.accepted["lines with Windows ends"] += 1
        yield Line(number, text.rstrip("\r\n"))
    if number == 0:
        raise DataError(f"{path}: the file is empty; was it written or copied completely?")
    if not raw.endswith(b"\n"):
        counts.accepted["no newline at the end"] += 1


def _refuse_foreign(head: bytes, path: Path) -> None:
    for start, what, remedy in FOREIGN_STARTS:
        if head.startswith(start):
            raise FormatError(f"{path}: this is {what}, not FASTA or CSV; {remedy}")
    nulls = head.count(0)
    if nulls * 3 > len(head) and (not any(head[1::2]) or not any(head[::2])):
        raise FormatError(f"{path}: this is UTF-16 text, not FASTA or CSV; save it as UTF-8")
    controls = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in head)
    if controls * 20 > len(head):
        raise FormatError(f"{path}: this is a binary file, not FASTA or CSV; check the path")
    if b"\r" in head.rstrip(b"\r\n"):
        raise FormatError(f"{path}: lines end with a bare CR (old Macintosh text); convert them with 'mac2unix'")
