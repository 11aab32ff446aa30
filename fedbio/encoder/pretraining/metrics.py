"""Write what a run measures for people: a line of JSON each, and TensorBoard where it is installed."""

from __future__ import annotations

__all__ = ["Metrics"]

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from fedbio.files import write_whole


class Metrics:
    """Append measurements to ``metrics.jsonl``, and to TensorBoard's files in ``tensorboard/``.

    A run that goes on measures the updates after its checkpoint once more: what an earlier process wrote of them is
    taken away first.

    Parameters
    ----------
    folder : Path
    step : int
        Updates that the checkpoint knows of; -1 without a checkpoint.
    tensorboard : bool
        Use TensorBoard if it is installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = True) -> None:
        path = folder / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            write_whole(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._board: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Take what was measured after an update."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what there is and let go."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    """The step of a line; one that a kill cut off belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
