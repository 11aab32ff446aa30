"""Make what the first rank knows known to all processes that train together, as tensors over their own collectives."""

from __future__ import annotations

__all__ = ["agree", "share"]

from typing import TYPE_CHECKING, Any

import numpy as np

from fedbio.errors import FederationError
from fedbio.federation.model import Task, decode, encode
from fedbio.tensors import encoded_size, parse
from fedbio.tensors.layout import chunks

if TYPE_CHECKING:
    import torch


def agree(value: bool) -> bool:
    """Return the first rank's value on every rank.

    Parameters
    ----------
    value : bool
        On the first rank: what all shall know; elsewhere not looked at.

    Raises
    ------
    FederationError
        If the processes are not joined yet.
    """
    import torch

    _check_joined()
    return bool(_broadcast(torch.tensor([value], dtype=torch.int64)).item())


def share(task: Task | None, waits: bool) -> tuple[Task | None, bool]:
    """Return the first rank's task, or None, on every rank, and whether there is none only until now.

    Parameters
    ----------
    task : Task or None
        On the first rank: the task, or None; elsewhere not looked at.
    waits : bool
        On the first rank: whether all of them go on waiting; elsewhere not looked at.

    Raises
    ------
    FederationError
        If the processes are not joined yet.
    """
    import torch.distributed

    _check_joined()
    first = torch.distributed.get_rank() == 0
    sizes = torch.zeros(3, dtype=torch.int64)
    parts: list[Any] = [b"", b""]
    if first:
        body, tensors = encode(task) if task is not None else (b"", {})
        packed = np.empty(encoded_size(tensors) if tensors else 0, np.uint8)
        filled = 0
        for chunk in chunks(tensors, 1 << 20) if tensors else ():
            packed[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        parts = [body, packed]
        sizes = torch.tensor([*(len(each) for each in parts), waits])
    *lengths, wait_on = _broadcast(sizes).tolist()
    body_there, packed_there = (_broadcast_bytes(part, size) for part, size in zip(parts, lengths, strict=True))
    if first or not len(body_there):
        # the first rank keeps its own arrays
        return task, bool(wait_on)
    return decode(Task, body_there.tobytes(), parse(packed_there.data) if len(packed_there) else {}), False


def _check_joined() -> None:
    import torch.distributed

    if not torch.distributed.is_initialized():
        raise FederationError(
            "several ranks train together, but they are not joined; call torch.distributed.init_process_group() "
            "before flare.receive() or flare.is_running()"
        )


def _broadcast_bytes(part: Any, size: int) -> np.ndarray[Any, Any]:
    import torch

    if not size:
        return np.empty(0, np.uint8)
    here = np.frombuffer(bytearray(part) if isinstance(part, bytes) else part, np.uint8) if len(part) else None
    tensor = torch.from_numpy(np.empty(size, np.uint8) if here is None else here)
    return np.asarray(_broadcast(tensor).numpy())


def _broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return the first rank's tensor, in the memory of the processor."""
    import torch.distributed

    if torch.distributed.get_backend() == "nccl":
        # it moves nothing but what is on a device
        there = tensor.cuda()
        torch.distributed.broadcast(there, src=0)
        return there.cpu()
    torch.distributed.broadcast(tensor, src=0)
    return tensor
