"""Ask a script's function for the initial model: ``python -m fedbio.client.initial FILE FUNCTION``."""

from __future__ import annotations

__all__ = ["answer_with_initial", "initial_params"]

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbio.client.model import FLModel
from fedbio.client.session import enter


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
    TypeError, AttributeError
        If there is no such function, or it returns something else.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function)()
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


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).resolve().parent))
    answer_with_initial(Path(sys.argv[1]), sys.argv[2])
