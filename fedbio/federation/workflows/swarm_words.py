"""What server and sites say to each other in swarm learning; the server's words, without any cryptography."""

from __future__ import annotations

__all__ = [
    "ADOPT",
    "AGGREGATE",
    "BEGIN",
    "EVALUATE",
    "FINISH",
    "MAX_INTRODUCTION_BYTES",
    "MEET",
    "MODEL",
    "SHARE",
    "TRAIN",
    "UPDATE",
    "Aggregated",
    "Answered",
    "Errand",
    "Met",
]

import msgspec

MEET, BEGIN, SHARE, TRAIN, AGGREGATE, ADOPT, EVALUATE, FINISH = (
    f"swarm/{name}" for name in ("meet", "begin", "share", "train", "aggregate", "adopt", "evaluate", "finish")
)
"""Names of the tasks."""

UPDATE, MODEL, KEY = "update", "model", "key/"
"""Names of tensors, all of them sealed bytes: an update; a model; before a site's name, what opens the model for it.

To the aggregating site updates go under ``update/`` and the name of the site.
"""

MAX_INTRODUCTION_BYTES = 8 << 10
"""A statement, a signature and one certificate are about 1 KiB."""


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """What every task says.

    Parameters
    ----------
    run : str
        One run of the job from its begin to its end, 32 hexadecimal digits.
    exchange : int
        What the sites' keys are for; it never occurs twice in a run.
    round : int
        Number of the model that the task is about.
    tag : int
        The exchange in which that model was made: a round that was repeated has several.
    site : str
        Whom the task is about: who aggregates, or who made the model.
    examples : dict of str to int
        How many examples the sites have registered.
    introductions : dict of str to bytes
        Of the sites that the receiver deals with.
    keep : tuple of (round, tag)
        Models that may still be asked for.
    best : tuple of (round, tag)
        The best model at the end.
    metric : str
        What shall be reported of the model, if the script measures it.
    least : int
        How many updates must count.
    """

    run: str
    exchange: int
    round: int = 0
    tag: int = 0
    site: str = ""
    examples: dict[str, int] = {}
    introductions: dict[str, bytes] = {}
    keep: tuple[tuple[int, int], ...] = ()
    best: tuple[int, int] = (0, 0)
    metric: str = ""
    least: int = 1


class Met(msgspec.Struct, frozen=True):
    """The answer to `MEET`: an introduction, and the models that the site holds, as (round, tag)."""

    introduction: bytes
    held: tuple[tuple[int, int], ...]


class Answered(msgspec.Struct, frozen=True):
    """The answer to `TRAIN`: why there is no sealed update, empty if there is one or the site aggregates itself."""

    problem: str = ""


class Aggregated(msgspec.Struct, frozen=True):
    """The answer to `AGGREGATE` and `SHARE`: whose updates count, and who is refused, as what."""

    counted: tuple[str, ...]
    refused: dict[str, str]
