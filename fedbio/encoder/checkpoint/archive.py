"""Take named members out of a tar archive, plain or gzip, from someone who may not mean well.

Nothing is ever written under a name that the archive gives. Sizes are read from the headers and judged before the
data are.
"""

from __future__ import annotations

__all__ = ["unpack_members"]

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from fedbio.errors import FormatError

_GZIP = b"\x1f\x8b"
_MAX_MEMBERS = 1000
_MAX_READ = 16 << 20
"""The most that is read in one piece: tarfile reads long names and the like whole, as long as they say they are."""
_MAX_EXPANSION = 20
"""Weights barely shrink; what expands more is made to fill the memory or the disk."""
_MIN_ALLOWED = 64 << 20
_CHUNK_BYTES = 1 << 20


class _Pieces(io.RawIOBase):
    """A file from which at most `_MAX_READ` bytes are read at once."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError("a header that claims to be enormous")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def unpack_members(path: Path, wanted: Mapping[str, tuple[Path, int]]) -> set[str]:
    """Copy some members of an archive to files of the caller's choice.

    Parameters
    ----------
    path : Path
    wanted : mapping of str to (Path, int)
        By the plain name of a member (``./`` before it does not count): where to write it, and the most bytes it may
        have.

    Returns
    -------
    set of str
        Which of them were there.

    Raises
    ------
    FormatError
        If the archive is damaged, a member leads out of it, is larger than allowed, or occurs twice.
    """
    packed_bytes = path.stat().st_size
    allowed = max(_MAX_EXPANSION * packed_bytes, _MIN_ALLOWED)
    found: set[str] = set()
    declared = 0
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == _GZIP
            raw.seek(0)
            stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if zipped else raw
            with tarfile.TarFile(fileobj=_Pieces(stream)) as archive:
                for number, member in enumerate(archive):
                    name = member.name.removeprefix("./")
                    declared += max(member.size, 0)
                    if number >= _MAX_MEMBERS:
                        raise FormatError(f"{path}: more than {_MAX_MEMBERS} members; not a checkpoint, not unpacked")
                    if ".." in Path(name).parts or name.startswith("/"):
                        raise FormatError(f"{path}: member {member.name!r} leads out of the archive; not unpacked")
                    # the next header lies behind this member's data: past them only if they are believable
                    if declared > allowed:
                        raise FormatError(
                            f"{path}: member {member.name!r} brings the unpacked size to {declared:,} bytes, from "
                            f"{packed_bytes:,}; not unpacked"
                        )
                    if name in wanted:
                        if name in found:
                            raise FormatError(f"{path}: member {name!r} occurs twice; not unpacked")
                        _copy(archive, member, path, *wanted[name])
                        found.add(name)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError, ValueError) as error:
        raise FormatError(f"{path}: not a sound tar archive, plain or gzip ({error}); get a fresh copy") from error
    return found


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, target: Path, most: int) -> None:
    if not member.isreg() or member.issparse():
        raise FormatError(f"{path}: member {member.name!r} is no plain file; not unpacked")
    if member.size > most:
        raise FormatError(
            f"{path}: member {member.name!r} says it has {member.size:,} bytes, more than the {most:,} allowed; "
            "not unpacked"
        )
    source = archive.extractfile(member)
    assert source is not None
    copied = 0
    with source, open(target, "wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            copied += file.write(chunk)
    if copied != member.size:
        raise FormatError(
            f"{path}: member {member.name!r} ends after {copied:,} of {member.size:,} bytes; copy it again"
        )
