"""Processes that never outlive the one that started them.

Run as a program, this file guards another one: ``python processes.py PARENT SOCKET COMMAND...`` starts the command
and ends, with its exit code, when that has ended, and with it all that it had started. When the parent dies, whatever
kills it, or asks for it with SIGUSR1, all of them are killed; SIGTERM is passed on to the command. A guard is needed
where a command starts processes of its own: the kernel kills only a process that has asked for it itself.

It imports nothing but the standard library, so that it starts at once and takes little memory.
"""

from __future__ import annotations

__all__ = ["KILL_ALL", "adopt_orphans", "children", "descendants", "die_with_parent", "guard_command"]

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

KILL_ALL = signal.SIGUSR1
"""Has a guard kill the command and everything that it has started."""

NOT_STARTED = 127
"""Exit code of a guard whose command could not be started."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to kill this process when the one that started it dies, whatever kills that one.

    Parameters
    ----------
    number : int
        The signal; one for which there is a handler can be used to leave nothing behind.
    """
    parent = os.getppid()
    _control(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Have what descendants of this process leave behind become its children, and not those of the system's first."""
    _control(_PR_SET_CHILD_SUBREAPER, 1)


def guard_command(command: Sequence[str], socket: str) -> list[str]:
    """Return the command line of a guard of `command`, for the process that calls this.

    Parameters
    ----------
    command : sequence of str
    socket : str
        A file that is removed with its folder when all is over; empty for none.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), socket, *command]


def _control(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value)


def children(parent: int) -> set[int]:
    """Return the processes that a process has started, or adopted."""
    return {each for each, its_parent in _parents().items() if its_parent == parent}


def descendants(root: int) -> list[int]:
    """Return all processes that a process has started, and those have started."""
    parents, found = _parents(), {root}
    while more := {each for each, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {root})


def _parents() -> dict[int, int]:
    """Return the parent of each process of this machine that has not ended."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                # the name of a program, in parentheses, may have any bytes in it
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state != b"Z":
                    parents[int(name)] = int(parent)
    return parents


def _kill_descendants() -> None:
    for each in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _guard(parent: int, socket: str, command: Sequence[str]) -> int:
    """Start a command and return its exit code once nothing of it is left; negative for a signal."""
    child = 0

    def kill_all(number: int, frame: FrameType | None) -> None:
        _kill_descendants()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, number)

    signal.signal(KILL_ALL, kill_all)
    signal.signal(signal.SIGTERM, pass_on)
    _control(_PR_SET_PDEATHSIG, KILL_ALL)
    adopt_orphans()
    if os.getppid() != parent:
        return -signal.SIGKILL
    signals = {KILL_ALL, signal.SIGTERM}
    # a signal that comes before the child is known waits until it is
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_prepare_command
        ).pid
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_STARTED
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code: int | None = None
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, status = os.waitpid(-1, 0)
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
            if code is not None:
                # again for each that ends: it may have started another one before it was killed
                _kill_descendants()
    if socket:
        with contextlib.suppress(OSError):
            # pathlib would take as long to import as all the rest
            os.unlink(socket)  # noqa: PTH108
            os.rmdir(os.path.dirname(socket))  # noqa: PTH106, PTH120
    return NOT_STARTED if code is None else code


def _prepare_command() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {KILL_ALL, signal.SIGTERM})
    die_with_parent()


def _main() -> None:
    code = _guard(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    if code < 0:
        # ends as the command did, so that whoever waits sees the signal
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _main()
