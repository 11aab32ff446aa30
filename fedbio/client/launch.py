"""Run a script: as a process, as ranks of torchrun, or as a thread of the site."""

from __future__ import annotations

__all__ = ["Ending", "Run", "RunningProcess", "RunningThread", "as_program", "process_command", "run_in_thread"]

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbio.client.initial import SAID_AS, MissingFunctionError
from fedbio.client.link import QueueLink
from fedbio.client.session import leave, offer
from fedbio.errors import FederationError
from fedbio.nursery import NURSERY, nursery_command
from fedbio.processes import KILL_ALL, guard_command

LAST_LINES = 20
"""Lines of a failed script that the site's log shows."""

READ_BYTES = 64 << 10
"""Bytes at the end of a script's log that are looked at for its last lines."""

SHOWN_CHARACTERS = 300
"""Characters of a line that others may see."""

LOOK_EVERY_S = 0.05
"""Seconds between two looks at whether a script that is waited for has ended."""

_TRACEBACK = "Traceback (most recent call last)"
_RANK = re.compile(r"\[rank(\d+)\]:\s?")
_WITHOUT_TRACEBACK = ("SyntaxError", "IndentationError", "TabError", SAID_AS)
_CULPRIT, _NAMED_RANK = "Root Cause", re.compile(r"\s+rank\s*: (\d+)")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run has ended.

    Parameters
    ----------
    code : int
        Exit code; negative for a signal.
    """

    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class Run(ABC):
    """A script that runs.

    Parameters
    ----------
    log : Path
        Where its output goes; what is there already stays.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._begin = log.stat().st_size if log.exists() else 0

    @abstractmethod
    def stop(self, polite_s: float, firm_s: float) -> None:
        """Give it some time to end by itself, ask it to end, and kill it."""

    def last_lines(self) -> list[str]:
        """Return the last lines that it has written."""
        return self._lines()[-LAST_LINES:]

    def exception(self) -> str:
        """Return the last line of the exception that ended it, cut short; empty if it wrote none."""
        found, rank, last = {}, "", ""
        inside = at_fault = False
        for line in self._lines():
            prefix = _RANK.match(line)
            bare = line[prefix.end() :] if prefix else line
            if bare.startswith(_TRACEBACK):
                inside = True
            elif inside and not bare.startswith((" ", "\t")):
                inside = False
                # torchrun's own exception says nothing of the rank's
                if "ChildFailedError" not in bare:
                    last = found[prefix.group(1) if prefix else ""] = bare
            elif bare.startswith(_WITHOUT_TRACEBACK):
                last = bare
            at_fault |= line.startswith(_CULPRIT)
            if at_fault and (named := _NAMED_RANK.match(line)):
                rank = named.group(1)
        # one rank's exception makes the others fail too
        return found.get(rank, last)[:SHOWN_CHARACTERS]

    def _lines(self) -> list[str]:
        if not self.log.exists():
            return []
        with open(self.log, "rb") as file:
            file.seek(max(self._begin, self.log.stat().st_size - READ_BYTES))
            return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def process_command(script: str, arguments: Sequence[str], ranks: int | None) -> list[str]:
    """Return the command line of a script; `ranks` are processes of torchrun, None runs it as it is.

    Where whoever has started this process offers a nursery, a script as it is runs there.
    """
    if ranks is None and script != "-m" and (nursery := os.environ.get(NURSERY)):
        return nursery_command(nursery, script, arguments)
    if ranks is None:
        return [sys.executable, script, *arguments]
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    return [sys.executable, *elastic, script, *arguments]


class RunningProcess(Run):
    """A script in processes of its own, which end with this one, whatever ends it.

    Parameters
    ----------
    command : sequence of str
    folder : Path
        Where it runs.
    environment : mapping of str to str
    log : Path
    socket : str
        A file that goes with it.
    on_end : callable
        Takes its `Ending`, on a thread of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        log: Path,
        socket: str,
        on_end: Callable[[Ending], None],
    ) -> None:
        super().__init__(log)
        with open(log, "ab") as output:
            self._popen = subprocess.Popen(
                guard_command(command, socket),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._on_end = on_end
        threading.Thread(target=self._wait, name="script-ends", daemon=True).start()

    def _wait(self) -> None:
        self._on_end(Ending(self._popen.wait()))

    def stop(self, polite_s: float, firm_s: float) -> None:
        for number, wait_s in ((signal.SIGTERM, polite_s), (KILL_ALL, firm_s)):
            try:
                self._popen.wait(wait_s)
                return
            except subprocess.TimeoutExpired:
                self._popen.send_signal(number)
        self._popen.wait()


class RunningThread(Run):
    """A script on a thread of this process.

    A thread cannot be killed: one that does not end when its connection has ended is left to itself.

    Parameters
    ----------
    work : callable
        What runs on it.
    link : QueueLink
    default : str
        ``"torch"`` or ``"numpy"``: as what the script gets parameters that it has never sent.
    log : Path
    on_end : callable
        Takes its `Ending`.
    """

    def __init__(
        self, work: Callable[[], None], link: QueueLink, default: str, log: Path, on_end: Callable[[Ending], None]
    ) -> None:
        super().__init__(log)
        self._work, self._link, self._default, self._on_end = work, link, default, on_end
        self._thread = threading.Thread(target=self._run, name="script", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        code = 0
        offer(self._link, lambda: self._default)
        try:
            self._work()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except MissingFunctionError as error:
            code = 1
            with open(self.log, "a", encoding="utf-8") as log:
                print(error, file=log)
        except BaseException:
            code = 1
            with open(self.log, "a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        finally:
            leave()
        self._on_end(Ending(code))

    def rest(self, timeout_s: float) -> None:
        """Wait until the script asks for its next task, or has ended."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive() and not self._link.resting.wait(LOOK_EVERY_S) and time.monotonic() < deadline:
            pass

    def stop(self, polite_s: float, firm_s: float) -> None:
        self._thread.join(polite_s)
        self._link.close()
        self._thread.join(firm_s)


_lock = threading.Lock()
_running: dict[int, Sequence[str]] = {}
"""Arguments by the thread that runs with them."""
_own_argv: list[str] = []
"""Those of this process itself, while scripts run in it."""


@contextlib.contextmanager
def as_program(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Let code on this thread import from a script's folder, and see the script's arguments.

    Raises
    ------
    FederationError
        If a script with other arguments runs in this process: all of it has one `sys.argv`.
    """
    folder, thread = str(script.parent), threading.get_ident()
    with _lock:
        if any(other != arguments for other in _running.values()):
            raise FederationError(
                "another script with other arguments runs in this process; use launch: process for one of them"
            )
        if not _running:
            _own_argv[:] = sys.argv
        _running[thread] = arguments
        sys.argv[:] = [str(script), *arguments]
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        with _lock:
            del _running[thread]
            sys.path.remove(folder)
            if not _running:
                sys.argv[:] = _own_argv
            forget_modules(script.parent)


def run_in_thread(script: Path) -> None:
    """Run a script on this thread as if it were the program."""
    # not runpy.run_path: it would put the script into the place of this process's own __main__, for all threads
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)  # noqa: S102 - the site allows it


def forget_modules(folder: Path) -> None:
    """Have modules of a folder loaded anew when they are imported again: another job's may have the same names."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).parent == folder:
            del sys.modules[name]
