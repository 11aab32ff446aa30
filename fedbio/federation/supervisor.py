"""Start processes, relay what they say, and end all of them when one fails, this process dies, or someone says stop."""

from __future__ import annotations

__all__ = ["Process", "supervise"]

import collections
import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO

from fedbio.errors import FedbioError, FederationError, InputError, RefusedError
from fedbio.processes import die_with_parent

BLAME_S = 3.0
"""Seconds after a first failure in which the others may end by themselves, before they are ended."""

STOP_S = 7.0
"""Seconds between asking a process to end and killing it."""

LEAVE_S = 60.0
"""Seconds in which the others have to end after the first one that ended well."""

LAST_LINES = 8
"""Lines of the culprit's log that are shown."""

_ERRORS: dict[int, type[FedbioError]] = {1: FedbioError, 2: InputError, 4: RefusedError}


@dataclass
class Process:
    """One child: its name, command and log file."""

    name: str
    command: Sequence[str]
    log: Path
    last: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=LAST_LINES))
    popen: subprocess.Popen[bytes] | None = None
    ended: float | None = None
    stopped: bool = False
    _rest: bytes = b""

    def start(self, environment: Mapping[str, str]) -> IO[bytes]:
        """Start it in a session of its own and return its output."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.popen = subprocess.Popen(
            self.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert self.popen.stdout is not None
        return self.popen.stdout

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return None if self.popen is None else self.popen.poll()

    def relay(self, output: IO[bytes], stream: TextIO) -> bool:
        """Pass on the whole lines that have come; return False at the end of the output."""
        # not `output.read`, which would wait for the whole of what it was asked for
        chunk = os.read(output.fileno(), 65_536)
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop() if chunk else b""
        with open(self.log, "ab") as log:
            for line in lines:
                if line or chunk:
                    log.write(line + b"\n")
                    text = line.decode(errors="replace")
                    self.last.append(text)
                    print(f"{self.name} | {text}", file=stream, flush=True)
        return bool(chunk)

    def close(self) -> None:
        """Close its output."""
        if self.popen is not None and self.popen.stdout is not None:
            self.popen.stdout.close()

    def signal(self, number: int) -> None:
        """Send a signal to it and to what it has started."""
        if self.popen is not None and self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)


def supervise(processes: Sequence[Process], environment: Mapping[str, str], stream: TextIO = sys.stderr) -> None:
    """Run processes to their end.

    Raises
    ------
    FedbioError
        If one fails: names it, shows the last lines of its log, and carries its exit code. All others are ended.
    """
    with selectors.DefaultSelector() as selector:
        try:
            for process in processes:
                selector.register(process.start(environment), selectors.EVENT_READ, process)
            _watch(processes, selector, stream)
        finally:
            _end(processes)
            _relay(selector, stream, 0.0)
            for process in processes:
                process.close()
    culprit = _culprit(processes)
    if culprit is not None:
        raise _failure(culprit)
    if late := [process.name for process in processes if process.stopped]:
        raise FederationError(
            f"{', '.join(late)} did not end within {LEAVE_S:.0f} s after the others and had to be ended; "
            f"see {', '.join(str(process.log) for process in processes if process.stopped)}"
        )


def _watch(processes: Sequence[Process], selector: selectors.BaseSelector, stream: TextIO) -> None:
    """Relay until all have ended, or too long after one has failed or ended before the others."""
    while any(process.code is None for process in processes) or selector.get_map():
        _relay(selector, stream, 0.2)
        now = time.monotonic()
        for process in processes:
            if process.ended is None and process.code is not None:
                process.ended = now
        failures = [process.ended for process in processes if process.code and process.ended]
        endings = [process.ended for process in processes if process.ended]
        if (failures and now - min(failures) > BLAME_S) or (endings and now - min(endings) > LEAVE_S):
            return


def _relay(selector: selectors.BaseSelector, stream: TextIO, wait_s: float) -> None:
    if not selector.get_map():
        time.sleep(wait_s)
        return
    for key, _ in selector.select(wait_s):
        assert not isinstance(key.fileobj, int)
        if not key.data.relay(key.fileobj, stream):
            selector.unregister(key.fileobj)


def _end(processes: Sequence[Process]) -> None:
    for process in processes:
        process.stopped = process.popen is not None and process.code is None
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while any(process.popen and process.code is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.signal(signal.SIGKILL)
        if process.popen is not None:
            process.popen.wait()


def _culprit(processes: Sequence[Process]) -> Process | None:
    """Return who failed first by itself: a crash or a wrong input comes before one that only lost its peers."""
    failed = [process for process in processes if process.code and not process.stopped]
    if not failed:
        return None
    return min(failed, key=lambda process: (process.code == 3, process.ended or math.inf))


def _failure(culprit: Process) -> FedbioError:
    code = culprit.code or 0
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = "\n".join(f"  {line}" for line in culprit.last)
    kind = _ERRORS.get(code, FederationError)
    return kind(f"{culprit.name} {ending}, all others were ended; its last lines ({culprit.log}):\n{lines}")
