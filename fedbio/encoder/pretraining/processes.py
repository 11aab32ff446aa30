"""Train with several processes, each on packs of its own: what torchrun starts, joined by sums of gradients."""

from __future__ import annotations

__all__ = ["Processes", "joined_processes"]

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

PACKING = datetime.timedelta(days=1)
"""How long processes wait for the first one, which packs the corpus; torch would give up after half an hour."""


@dataclass(frozen=True)
class Processes:
    """This process among all that train together.

    Parameters
    ----------
    rank, world : int
        Its number, and how many there are.
    local, local_world : int
        The same on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    def sum(self, vector: Tensor) -> None:
        """Make a vector the sum of all processes' vectors, in place; the order of the sum is the same each time."""
        if self.world > 1:
            torch.distributed.all_reduce(vector)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set in any process."""
        if self.world == 1:
            return flag
        vector = torch.tensor([float(flag)], device=device)
        self.sum(vector)
        return bool(vector.item())

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be alone."""
    if not torch.distributed.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    processes = Processes(*(int(os.environ[name]) for name in names))
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(processes.local)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=PACKING)
    try:
        yield processes
    finally:
        torch.distributed.destroy_process_group()
