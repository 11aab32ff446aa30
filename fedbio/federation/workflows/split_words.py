"""What server and sites say to each other in split learning."""

from __future__ import annotations

__all__ = ["ALIGN", "FINISH", "LOSS", "MEET", "TRAIN", "Aligned", "Met", "SplitOrder"]

from typing import Literal

import msgspec

MEET, ALIGN, TRAIN, FINISH = (f"split/{name}" for name in ("meet", "align", "train", "finish"))
"""Names of the tasks."""

LOSS = "train_loss"
"""The metric that the site with the labels reports of an epoch."""


class SplitOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What every task says; `FLModel.current_round` is the epoch that it is about, counted from 0.

    Parameters
    ----------
    run : str
        One run of the job from its begin to its end, 32 hexadecimal digits.
    session : str
        The session in which the two sites exchange messages for this task.
    bottom, top : str
        The site with the features and that with the labels.
    seed : int
        Of the initial weights, of the order of the batches, and of what is drawn in training.
    batch_size : int
        The most rows in a batch.
    rows : int
        How many rows both sites have in common; 0 until they know.
    introductions : dict of str to bytes
        Of both sites, for `ALIGN`.
    """

    run: str
    session: str
    bottom: str
    top: str
    seed: int
    batch_size: int
    rows: int = 0
    introductions: dict[str, bytes] = {}

    def role(self, site: str) -> Literal["bottom", "top"]:
        """Return which part of the network a site has."""
        return "bottom" if site == self.bottom else "top"

    def other(self, site: str) -> str:
        """Return the site that a site works with."""
        return self.top if site == self.bottom else self.bottom


class Met(msgspec.Struct, frozen=True):
    """The answer to `MEET`: the site's introduction."""

    introduction: bytes


class Aligned(msgspec.Struct, frozen=True):
    """The answer to `ALIGN`: how many rows both sites have."""

    rows: int
