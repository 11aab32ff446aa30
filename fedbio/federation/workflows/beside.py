"""Named tensors that a controller keeps beside the model of a round: a server that was killed has both or neither."""

from __future__ import annotations

__all__ = ["Beside"]

from pathlib import Path

from fedbio.federation.model import Parameters
from fedbio.tensors import open_file, write_file


class Beside:
    """Keeps tensors by the part of a controller that they belong to, and by round.

    Parameters
    ----------
    folder : Path

    Attributes
    ----------
    parts : dict of str to (dict of str to ndarray)
        What is kept with the next round; a part's name has no slash.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.parts: dict[str, Parameters] = {}

    def load(self, number: int) -> None:
        """Take up what was saved with a round."""
        path = self._path(number)
        self.parts = {}
        for name, value in open_file(path).items() if path.exists() else ():
            part, _, rest = name.partition("/")
            self.parts.setdefault(part, {})[rest] = value

    def save(self, number: int) -> None:
        """Save the parts; call it before the round itself is saved."""
        tensors = {f"{part}/{name}": value for part, named in self.parts.items() for name, value in named.items()}
        if tensors:
            write_file(self._path(number), tensors)

    def forget_before(self, number: int) -> None:
        """Remove what went with earlier rounds; call it after the round was saved."""
        for path in self._folder.glob("beside-*.safetensors"):
            if path < self._path(number):
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"beside-{number:07}.safetensors"
