"""What a job of a training script says to the sites: the words that server and executors share."""

from __future__ import annotations

__all__ = [
    "DEPLOY",
    "END",
    "EVALUATE",
    "EXAMPLES",
    "EXCLUDE",
    "INIT",
    "SUBMIT_MODEL",
    "TRAIN",
    "ClientSpec",
    "CodeFile",
]

import hashlib
from typing import Literal

import msgspec

DEPLOY, INIT, TRAIN, EVALUATE, SUBMIT_MODEL, END = (
    f"client/{name}" for name in ("deploy", "init", "train", "evaluate", "submit_model", "end")
)
"""Names of the tasks; the script sees them without what is before the slash."""

EXCLUDE = "exclude"
"""Key in a task's meta: patterns of the names of parameters that stay at the site."""

EXAMPLES = "examples"
"""Key in the answer to `DEPLOY`: how many examples a site registers, the most weight that it may claim."""


class CodeFile(msgspec.Struct, frozen=True):
    """A file that a script consists of."""

    name: str
    sha256: str
    size: int


class ClientSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the sites shall run; see `fedbio.settings_jobs.ClientSettings`."""

    workflow: str
    files: tuple[CodeFile, ...]
    script: str
    launch: Literal["process", "in_process", "torchrun"] = "process"
    processes: int = 1
    arguments: tuple[str, ...] = ()
    initial: str | None = None
    idle_s: float = 3600.0
    rounds: int = 1

    @property
    def group(self) -> str:
        """One digest for all files: sites keep them together under it."""
        return hashlib.sha256("".join(f"{each.name} {each.sha256}\n" for each in self.files).encode()).hexdigest()
