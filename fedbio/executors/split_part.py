"""A site's part of a split network between two epochs: in memory, and as a file that the site goes on from."""

from __future__ import annotations

__all__ = ["Part"]

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FederationError, FormatError
from fedbio.federation.model import Parameters
from fedbio.tensors import open_file, write_file

if TYPE_CHECKING:
    import torch
    from torch import nn, optim

MODULE, OPTIMIZER, NUMBERS = "module/", "optimizer/", "numbers"
"""Before the names of the tensors of a file's module and optimizer; and all that is no tensor, as JSON."""


class _Numbers(msgspec.Struct):
    """What a checkpoint says beside its tensors: the run that it belongs to, and an optimizer's numbers."""

    run: str
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]


@dataclass(slots=True)
class Part:
    """A module, its optimizer, and how many epochs they were trained for.

    Parameters
    ----------
    folder : Path
        Where its checkpoints are: ``epoch-00003.safetensors`` holds the part after three epochs, and never a pickle.
    run : str
        Of the job; a checkpoint of another one is not taken.
    """

    folder: Path
    run: str
    module: nn.Module
    optimizer: optim.Optimizer
    epoch: int = 0

    def save(self) -> None:
        """Write the checkpoint of the present epoch; of earlier ones, the last is kept.

        Raises
        ------
        FederationError
            If the optimizer keeps something that is neither a tensor nor a number.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self._path(self.epoch), {**self._module_arrays(), **self._optimizer_arrays()})
        for path in self._checkpoints():
            if path not in (self._path(self.epoch), self._path(self.epoch - 1)):
                path.unlink()

    def load(self, epoch: int) -> None:
        """Take the checkpoint of an epoch.

        Raises
        ------
        FederationError
            If there is none, or it is of another run, or of another network.
        """
        path = self._path(epoch)
        if not path.exists():
            raise FederationError(
                f"this site has no checkpoint of epoch {epoch}; start the job anew, under another name, if it is lost"
            )
        arrays = open_file(path)
        try:
            numbers = msgspec.json.decode(arrays.pop(NUMBERS).tobytes(), type=_Numbers)
        except (KeyError, msgspec.MsgspecError) as error:
            raise FormatError(f"{path}: not a checkpoint of a split network ({error})") from error
        if numbers.run != self.run:
            raise FederationError(
                f"the checkpoint of epoch {epoch} is of another run; start the job under another name"
            )
        self._take(arrays, numbers, path)
        self.epoch = epoch

    def finish(self, path: Path) -> None:
        """Write the trained module; of the checkpoints, the last one stays, from which this can be done again."""
        write_file(path, {name.removeprefix(MODULE): value for name, value in self._module_arrays().items()})
        for each in self._checkpoints():
            if each != self._path(self.epoch):
                each.unlink()

    def forget(self) -> None:
        """Remove checkpoints of an earlier run."""
        for path in self._checkpoints():
            path.unlink()

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05}.safetensors"

    def _checkpoints(self) -> Iterator[Path]:
        yield from list(self.folder.glob("epoch-*.safetensors"))

    def _module_arrays(self) -> Parameters:
        return {MODULE + name: _array(name, value) for name, value in self.module.state_dict().items()}

    def _optimizer_arrays(self) -> Parameters:
        import torch

        content = self.optimizer.state_dict()
        arrays: Parameters = {}
        state: dict[str, dict[str, Any]] = {}
        for number, entries in content["state"].items():
            state[str(number)] = {}
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    arrays[f"{OPTIMIZER}{number}/{key}"] = _array(key, value)
                else:
                    state[str(number)][key] = value
        try:
            text = msgspec.json.encode(_Numbers(self.run, content["param_groups"], state))
        except TypeError as error:
            raise FederationError(
                f"{type(self.optimizer).__name__} keeps what cannot be written without a pickle ({error}); "
                "choose another optimizer"
            ) from error
        arrays[NUMBERS] = np.frombuffer(text, np.uint8)
        return arrays

    def _take(self, arrays: Parameters, numbers: _Numbers, path: Path) -> None:
        import torch

        # the arrays are mapped from the file and read-only
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in numbers.state.items()}
        for name, value in tensors.items():
            if name.startswith(OPTIMIZER):
                number, _, key = name.removeprefix(OPTIMIZER).partition("/")
                state[int(number)][key] = value
        try:
            self.module.load_state_dict(
                {name.removeprefix(MODULE): value for name, value in tensors.items() if name.startswith(MODULE)}
            )
            self.optimizer.load_state_dict({"state": state, "param_groups": numbers.groups})
        except (RuntimeError, ValueError, KeyError) as error:
            raise FederationError(f"{path.name} does not fit the part of the script: {error}") from error


def _array(name: str, value: torch.Tensor) -> NDArray[Any]:
    try:
        array: NDArray[Any] = value.detach().cpu().contiguous().numpy()
    except TypeError as error:
        raise FederationError(f"{name} of {value.dtype} cannot be kept in a file; use float32") from error
    return array
