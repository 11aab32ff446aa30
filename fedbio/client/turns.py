"""Scripts of several sites in one process, by turns: each finds its own random numbers and its own modules.

A script that runs in a process of its own seeds the random numbers of that process and imports modules beside it that
are its alone. Where one process plays many sites, as in a simulation, both are put in place for each turn, so that a
script does the same as it would have done alone.
"""

from __future__ import annotations

__all__ = ["OwnState", "take_turns"]

import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_turn = threading.Lock()
_by_turns = False
_folders: set[Path] = set()
"""Those in which scripts lie: whose turn it is may get a module from any of them, they are all the same job's."""


def take_turns() -> None:
    """Let scripts of several sites run in this process from now on."""
    global _by_turns
    _by_turns = True


class OwnState:
    """What one run of a script takes for its process's: the state of random numbers, and the modules beside it.

    Parameters
    ----------
    folder : Path
        Where the script lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, ModuleType] = {}
        self._random: dict[str, Any] | None = None

    @contextlib.contextmanager
    def turn(self, *, wait: bool = True) -> Iterator[bool]:
        """Put this state in place, and take it away again; in a process with one site nothing is done.

        Parameters
        ----------
        wait : bool
            Wait for the turn of another script to end; else do without this state until then.

        Yields
        ------
        bool
            Whether other scripts wait for the end of this turn.
        """
        if not _by_turns or not _turn.acquire(blocking=wait):
            yield False
            return
        try:
            _folders.add(self._folder)
            sys.modules.update(self._modules)
            if (folder := str(self._folder)) in sys.path:
                sys.path.remove(folder)
                sys.path.insert(0, folder)
            others = _random_state()
            _set_random_state(self._random)
            try:
                yield True
            finally:
                self._random = _random_state()
                _set_random_state(others)
                self._modules = {
                    name: module for name, module in list(sys.modules.items()) if _parent(module) in _folders
                }
                for name in self._modules:
                    del sys.modules[name]
        finally:
            _turn.release()


def _parent(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).parent


def _random_state() -> dict[str, Any]:
    """Return the state of what scripts draw from without a generator of their own."""
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state()}  # noqa: NPY002 - scripts use it
    if (torch := sys.modules.get("torch")) is not None:
        state["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any] | None) -> None:
    """Put a state in place; None is that of a new process, which nobody knows."""
    if state is None:
        random.seed()
        np.random.seed()  # noqa: NPY002 - scripts use it
    else:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002 - scripts use it
    if (torch := sys.modules.get("torch")) is None:
        return
    if state is None or "torch" not in state:
        torch.seed()
    else:
        torch.set_rng_state(state["torch"])
        if "cuda" in state:
            torch.cuda.set_rng_state_all(state["cuda"])
