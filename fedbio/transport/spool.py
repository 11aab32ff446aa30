"""Files for payloads that are arriving: nameless ones that end with the process, and partial ones that outlive it."""

from __future__ import annotations

__all__ = ["Partial", "Spool", "make_room", "sweep"]

import contextlib
import errno
import fcntl
import glob
import mmap
import os
import tempfile
import time
import weakref
from pathlib import Path

from blake3 import blake3

from fedbio.errors import TransportError
from fedbio.transport.objects import CHUNK_BYTES

SUFFIX = ".part"

WRITE_BACK_BYTES = 8 << 20
"""Bytes of a file after which the system is asked to bring them to the disk."""

WHOLE = ".whole-"
"""How the name of a file begins that has come whole and is in use; it goes with its process."""

PATIENCE_S = 2.0
"""Seconds that a file waits for its name: who held it before may be about to let go."""


class Spool:
    """A file without a name: what is not saved is gone with the process, whatever ends it.

    Raises
    ------
    OSError
        If the disk has no room for `size` bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # looked at, not taken: a peer that only declares sizes must not fill the disk for the others
        _check_room(folder, size)
        self._descriptor = _open_nameless(folder)
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, chunk: memoryview) -> None:
        """Append a chunk."""
        _write_all(self._descriptor, chunk)

    def map(self) -> memoryview:
        """Return the whole content, mapped read-only."""
        return _mapped(self._descriptor)

    def link(self, path: Path) -> bool:
        """Give the file a name, if its file system can."""
        with contextlib.suppress(OSError):
            os.link(f"/proc/self/fd/{self._descriptor}", path, follow_symlinks=True)
            return True
        return False


class Partial:
    """A file that arrives, by a name that depends on its sender and its transfer alone.

    What it holds is whole chunks from the beginning; a process that was killed leaves them to the next one. If the same
    file is arriving already, this one gets a name of its own, and leaves nothing.

    Parameters
    ----------
    folder : Path
    prefix : str
        Beginning of its name.
    peer : str
        Who sends it.
    transfer : bytes or None
        What the sender knows it by; None if it cannot go on in another process.
    size : int or None
        Bytes in all, as declared.

    Raises
    ------
    OSError
        If the disk has no room for it.
    """

    def __init__(self, folder: Path, prefix: str, peer: str, transfer: bytes | None, size: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None
        if transfer is not None:
            # nothing that a peer has said is part of a path: only a digest of it
            self._path = folder / f"{prefix}{blake3(peer.encode() + b'/' + transfer).hexdigest(16)}{SUFFIX}"
            descriptor = _open_alone(self._path, PATIENCE_S)
        self._returns = descriptor is not None
        if descriptor is None:
            self._path = folder / f"{prefix}{os.urandom(16).hex()}{SUFFIX}"
            descriptor = _open_alone(self._path)
            assert descriptor is not None
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._unsafe = 0
        self.chunks = 0
        if self._returns:
            self.chunks = min(os.fstat(self._descriptor).st_size, size or 0) // CHUNK_BYTES
        missing = (size or 0) - self.chunks * CHUNK_BYTES
        try:
            _check_room(folder, missing)
        except OSError:
            self.discard()
            raise
        self._truncate()

    def hasher(self) -> blake3:
        """Return the running digest of what is there."""
        running = blake3()
        buffer = bytearray(CHUNK_BYTES)
        for number in range(self.chunks):
            if os.preadv(self._descriptor, [buffer], number * CHUNK_BYTES) != CHUNK_BYTES:
                raise TransportError("a half-received file has changed on the disk")
            running.update(buffer)
        return running

    def restart(self) -> None:
        """Forget what is there."""
        self.chunks = 0
        self._truncate()

    def write(self, chunk: memoryview) -> None:
        """Append a chunk."""
        _write_all(self._descriptor, chunk)
        self._unsafe += len(chunk)
        if self._unsafe >= WRITE_BACK_BYTES:
            # has the system begin to write now, so that disk and link work at the same time
            end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            os.posix_fadvise(self._descriptor, end - self._unsafe, self._unsafe, os.POSIX_FADV_DONTNEED)
            self._unsafe = 0

    def become(self, path: Path) -> None:
        """Take the name of the whole file, once it is safe on the disk."""
        os.fsync(self._descriptor)
        self._path.replace(path)
        self._close()

    def map(self) -> memoryview:
        """Return the whole content, mapped read-only; it has a name as long as this object."""
        # the same file may come again meanwhile
        self._path = self._path.replace(self._path.with_name(f"{WHOLE}{os.urandom(16).hex()}{SUFFIX}"))
        weakref.finalize(self, self._path.unlink, missing_ok=True)
        return _mapped(self._descriptor)

    def link(self, path: Path) -> bool:
        """Give the file a second name, if its file system can."""
        with contextlib.suppress(OSError):
            path.hardlink_to(self._path)
            return True
        return False

    def discard(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        self._close()

    def keep(self) -> None:
        """Leave the file for when its sender comes back with it."""
        if not self._returns:
            self.discard()
        self._close()

    def _truncate(self) -> None:
        os.ftruncate(self._descriptor, self.chunks * CHUNK_BYTES)
        os.lseek(self._descriptor, 0, os.SEEK_END)


def sweep(folder: Path, older_than_s: float) -> None:
    """Remove files that nobody has come back for."""
    for path in folder.glob(f".*{SUFFIX}") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.name.startswith(WHOLE) or time.time() - path.stat().st_mtime > older_than_s:
                _remove_unused(path)


def make_room(folder: Path, prefix: str, most: int) -> None:
    """Remove the oldest half-received files that nobody writes, so that there are at most `most`."""
    found = sorted(folder.glob(f"{glob.escape(prefix)}*{SUFFIX}"), key=_age, reverse=True)
    too_many = len(found) - most
    for path in found:
        if too_many > 0 and _remove_unused(path):
            too_many -= 1


def _age(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _remove_unused(path: Path) -> bool:
    descriptor = _open_alone(path)
    if descriptor is None:
        return False
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


def _open_alone(path: Path, patience_s: float = 0.0) -> int | None:
    """Return a descriptor of the file of that name, locked; None if another one holds it."""
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever held the lock may have renamed the file, which is whole then, or removed it
            if _is_named(path, descriptor):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)


def _is_named(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _check_room(folder: Path, size: int) -> None:
    room = os.statvfs(folder)
    if size > room.f_bavail * room.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _mapped(descriptor: int) -> memoryview:
    if os.fstat(descriptor).st_size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while len(chunk):
        chunk = chunk[os.write(descriptor, chunk) :]


def _open_nameless(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    # a file system without nameless files: make one and take its name away
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".spool-")
    Path(name).unlink()
    return descriptor
