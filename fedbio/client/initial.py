"""Ask a script's function for the initial model: in the script's process while it waits for its first task.

Or in a process of its own, for a script that does not run: ``python -m fedbio.client.initial FILE FUNCTION``.
"""

from __future__ import annotations

__all__ = ["SAID_AS", "MissingFunctionError", "answer_with_initial", "initial_params", "made_apart"]

import contextlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedbio.client.model import FLModel
from fedbio.client.session import enter

TORCH_SEED = 67280421310721
"""With which torch begins, ``c10::detail::default_rng_seed_val`` in c10/core/GeneratorImpl.h."""


SAID_AS = "client.initial: "
"""What the line begins with that says why a script's function could not be called."""


class MissingFunctionError(Exception):
    """A file lacks the function that is to make the initial model; where this was found tells its author nothing."""

    def __str__(self) -> str:
        return f"{SAID_AS}{super().__str__()}"


def initial_params(file: Path, function: str) -> Any:
    """Return the parameters that a function of a file returns.

    Parameters
    ----------
    file : Path
        A Python file; its folder is where it imports from.
    function : str
        Takes nothing; returns a torch module, a state dict, named arrays, or an `FLModel`.

    Raises
    ------
    MissingFunctionError
        If there is no such function; the message names those that there are.
    TypeError
        If it returns something else.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        ]
        raise MissingFunctionError(f"{file.name} has no function {function}; it has {', '.join(own) or 'none'}")
    found = make()
    if isinstance(found, FLModel):
        return found.params
    if callable(getattr(found, "state_dict", None)):
        return found.state_dict()
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{file.name}:{function} returned a {type(found).__name__}; expected a torch module or named arrays"
        )
    return found


def answer_with_initial(file: Path, function: str) -> None:
    """Answer the one task of this session with the initial model."""
    session = enter()
    if session.receive(None) is None:
        return
    session.initial = True
    params = initial_params(file, function)
    session.initial = False
    session.send(FLModel(params=params), clear=True)


def made_apart(initial: str) -> Callable[[], FLModel]:
    """Return what makes the initial model in a script's process and leaves no trace in its random numbers.

    Parameters
    ----------
    initial : str
        ``FILE:FUNCTION``.
    """
    file, _, function = initial.rpartition(":")

    def make() -> FLModel:
        with _missing_said(), same_random_numbers():
            return FLModel(params=initial_params(Path(file), function))

    return make


@contextlib.contextmanager
def _missing_said() -> Iterator[None]:
    """End this process with a line instead of a traceback if the function is missing."""
    try:
        yield
    except MissingFunctionError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(1) from None


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Have the generators of Python, NumPy and torch go on afterwards as if nothing had been drawn."""
    # the generators that a script draws from without a word
    plain, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch = sys.modules.get("torch")
    state = None if torch is None else torch.random.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)  # noqa: NPY002
        if torch is not None:
            torch.random.set_rng_state(state)
            if devices is not None:
                torch.cuda.set_rng_state_all(devices)
        elif (torch := sys.modules.get("torch")) is not None:
            torch.manual_seed(TORCH_SEED)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).resolve().parent))
    with _missing_said():
        answer_with_initial(Path(sys.argv[1]), sys.argv[2])
