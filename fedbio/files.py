"""Write files whole or not at all, name them by content, and hold a lock per output."""

from __future__ import annotations

__all__ = ["exclusive_lock", "full_disk_named", "read_at", "sha256_file", "sync_folder", "whole_file", "write_whole"]

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from fedbio.errors import MachineError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    Parameters
    ----------
    path : path-like
        Where the finished file shall appear. Missing parent folders are made.

    Yields
    ------
    Path
        A path in the same folder to write to. It is removed if the block raises.

    Raises
    ------
    MachineError
        If the disk is full; the previous file, if any, is untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # two threads may write one file: the later one wins, whole
    beside = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_native_id()}.part")
    try:
        with full_disk_named(target):
            yield beside
            with open(beside, "rb") as written:
                os.fsync(written.fileno())
            os.replace(beside, target)
            sync_folder(target.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file did not fit while the block ran.

    Raises
    ------
    MachineError
        If the disk, a quota or the limit of a file's size is at its end.
    """
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "the disk is full; free some space",
            errno.EFBIG: "the file may not grow so large; raise its limit (ulimit -f) or choose another disk",
        }.get(error.errno or 0)
        if reason is None:
            raise
        raise MachineError(
            f"{path}: {reason} and run the same command again, nothing that was there before is lost"
        ) from error


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the file at `path` by `content` (text as UTF-8), whole or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def read_at(descriptor: int, into: memoryview, offset: int) -> None:
    """Fill a contiguous buffer with a file's bytes from `offset`; the file's position is neither used nor moved.

    Raises
    ------
    EOFError
        If the file ends before the buffer is full.
    """
    rest = into.cast("B")
    while rest:
        read = os.preadv(descriptor, [rest], offset)
        if not read:
            raise EOFError("the file ends before what is to be read")
        rest, offset = rest[read:], offset + read


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike[str], purpose: str, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock file while the block runs; the kernel frees it when the process ends.

    Parameters
    ----------
    path : path-like
        The lock file; it holds the owner's process id and stays behind, empty of meaning, afterwards.
    purpose : str
        What is locked, for the message of the one who comes second.
    wait : bool
        Let the one who comes second wait for the first.

    Raises
    ------
    MachineError
        If another living process holds the lock, and it is not to be waited for; the message names its process id.
    """
    lock_path = Path(path)
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            if not wait:
                raise MachineError(
                    f"{purpose} is in use by process {owner} (lock {lock_path}); wait for it or stop it first"
                ) from error
            log.info("in use by another process, waiting for it file=%s process=%s", purpose, owner)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
