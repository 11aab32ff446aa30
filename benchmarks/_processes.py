"""Run functions in other processes, one call at a time, and count what they cost: the parties of a benchmark."""

from __future__ import annotations

__all__ = ["Party", "cpu_seconds", "peak_rss", "reset_peak_rss"]

import contextlib
import multiprocessing
import os
import re
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")


def cpu_seconds() -> float:
    """Return the seconds of processor time that this process has used, in user and system mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak_rss() -> int:
    """Set the peak of this process's resident memory back to what it is now; return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


def peak_rss() -> int:
    """Return the peak of this process's resident memory since it began or `reset_peak_rss`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Party:
    """A process that keeps a state between calls; functions are called with that state, a dict, first."""

    def __init__(self, name: str, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs,), name=name, daemon=True)
        before = dict(os.environ)
        os.environ.update(environment or {})
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Begin a call; `result` waits for it."""
        self._pipe.send((function, args, kwargs))

    def result(self, within_s: float = 600.0) -> Any:
        """Return what the call that was begun returned."""
        if not self._pipe.poll(within_s):
            raise SystemExit(f"{self.name} did not answer within {within_s:.0f} s")
        value, error = self._pipe.recv()
        if error is not None:
            raise SystemExit(f"{self.name} failed:\n{error}")
        return value

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function there and return what it returned."""
        self.start(function, *args, **kwargs)
        return self.result()

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has used so far."""
        return float(self.call(_cpu_seconds))

    def reset_peak_rss(self) -> int:
        """Forget the process's peak of resident memory; return what it holds now, in bytes."""
        return int(self.call(_reset_peak_rss))

    def peak_rss(self) -> int:
        """Return the process's peak of resident memory, in bytes."""
        return int(self.call(_peak_rss))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Party:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _serve(pipe: Any) -> None:
    state: dict[str, Any] = {}
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            break
        if call is None:
            break
        function, args, kwargs = call
        try:
            pipe.send((function(state, *args, **kwargs), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    os._exit(0)  # threads of the libraries under test do not hold up the end


def _cpu_seconds(state: dict[str, Any]) -> float:
    return cpu_seconds()


def _reset_peak_rss(state: dict[str, Any]) -> int:
    return reset_peak_rss()


def _peak_rss(state: dict[str, Any]) -> int:
    return peak_rss()
