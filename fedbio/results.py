"""What a run leaves behind for the report: the records and tables that every party writes in its own workspace.

A workspace is one folder per party. It holds ``party.json`` (a `PartyRecord`), ``metrics.csv``, ``predictions.csv``
(at parties that own proteins), ``events.jsonl`` and, where the 2-D map was allowed, ``map.csv``. Nothing in here is a
sequence or an embedding. The report reads these files and nothing else.
"""

from __future__ import annotations

__all__ = [
    "CENTRAL",
    "EVENTS_FILE",
    "FEDERATED",
    "MAP_COLUMNS",
    "MAP_FILE",
    "METRICS_COLUMNS",
    "METRICS_FILE",
    "PARTY_FILE",
    "PREDICTIONS_COLUMNS",
    "PREDICTIONS_FILE",
    "ClassCounts",
    "DataRecord",
    "EncoderInfo",
    "EventLog",
    "MapPoint",
    "Metric",
    "PartyRecord",
    "Prediction",
    "Traffic",
    "read_party",
    "utc_now",
    "write_party",
    "write_table",
]

import copy
import csv
import datetime
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from fedbio.errors import FormatError
from fedbio.files import whole_file, write_whole

PARTY_FILE = "party.json"
METRICS_FILE = "metrics.csv"
PREDICTIONS_FILE = "predictions.csv"
EVENTS_FILE = "events.jsonl"
MAP_FILE = "map.csv"

FEDERATED = "federated"
"""Value of a `party` column for the model that all sites trained together."""
CENTRAL = "central"
"""Value of a `party` column for the model trained on all proteins in one place, where that is possible."""


class EncoderInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How proteins became vectors; two embeddings may be compared only if they differ in nothing (`differing`).

    Parameters
    ----------
    name : str
        Architecture or checkpoint name, for example ``"esm1nv-44m"``.
    weights_sha256 : str
        SHA-256 of the weights that inference used, 64 hexadecimal digits.
    trained : bool
        False if the weights are random numbers from a fixed seed.
    width : int
        Length of a row, D; with the pooling ``"ends"`` a multiple of the encoder's own width.
    pooling : str
        ``"mean"``: the average over residues; ``"ends"``: that and the averages over bins at both ends; ``"max"``: the
        maximum of residues; ``"start"``: the start token, and of several windows the average of theirs;
        ``"residues"``: none, there is a row per residue.
    layer : int
        Number of the transformer layer whose output is pooled, counted from 1; 0 is the input of the first. The last
        one's output has passed the final norm.
    dtype : str
        ``"float32"``, ``"bfloat16"`` or ``"int8"`` (of linear maps only): the arithmetic of inference.
    max_residues : int
        The longest protein, in residues, that the encoder takes whole.
    long : str
        What was done with longer ones: ``"window"``, they were covered by overlapping windows in which each residue
        counts once, or ``"cut"``, only their beginning was used.
    bins : str
        Of ``"ends"``, how many residues the bins hold: ``"start 20 40, end 10 30"`` are the first 20 and the 40 after
        them, the last 10 and the 30 before them. Empty for any other pooling.
    perplexity : float or None
        Of the encoder, at masked residues of proteins that were held out from its training; None if nobody has told.
    """

    name: str
    weights_sha256: str
    trained: bool
    width: int
    pooling: Literal["mean", "ends", "max", "start", "residues"]
    layer: int
    dtype: str
    max_residues: int
    long: Literal["cut", "window"]
    bins: str = ""
    perplexity: float | None = None

    @property
    def whole_width(self) -> int:
        """How many columns, from the first on, describe the whole protein; with ``"ends"`` the others are of bins."""
        return self.width // (1 + len(re.findall(r"\d+", self.bins)))

    def differing(self, other: EncoderInfo) -> list[str]:
        """Name the fields in which two differ, in order, and of several that differ for one reason only that one.

        The perplexity and, of weights whose SHA-256 agree, their name are not among them: they are told of the weights.
        """
        known = self.weights_sha256 == other.weights_sha256 and len(self.weights_sha256) == 64
        told = ("perplexity", "name") if known else ("perplexity",)
        names = [
            name for name in self.__struct_fields__ if name not in told and getattr(self, name) != getattr(other, name)
        ]
        if self.pooling != other.pooling:
            names = [name for name in names if name not in ("width", "bins")]
        return names


class ClassCounts(msgspec.Struct, frozen=True):
    """Number of proteins of each class in each split; classes without any may be absent."""

    train: dict[str, int] = {}
    validation: dict[str, int] = {}
    test: dict[str, int] = {}


class DataRecord(msgspec.Struct, frozen=True):
    """What a party's own data were, in counts.

    `source` is a file's name without its folder; `synthetic` is True for proteins of the demo generator;
    `longer` counts the proteins longer than the encoder takes whole.
    """

    source: str
    synthetic: bool
    proteins: int
    residues: int
    longer: int
    counts: ClassCounts


class Traffic(msgspec.Struct):
    """Messages and bytes of one kind that left a party."""

    messages: int = 0
    bytes: int = 0


class PartyRecord(msgspec.Struct):
    """One party's account of a run, written as ``party.json`` in its workspace.

    Parameters
    ----------
    party : str
        The party's name: ``"server"``, ``"site-1"``, ..., or ``"central"``.
    role : str
        ``"server"``, ``"site"`` or ``"central"``.
    versions : dict
        Versions of fedbio, Python and the libraries that the party computed with.
    settings : dict
        The job's settings as the party used them (JSON).
    seconds : dict
        Wall-clock seconds by stage, for example ``{"embed": 61.2, "train": 30.5}``.
    peak_memory_bytes : int
        The largest resident set of the party's process.
    classes : list of str
        The federation's classes, in order.
    encoder : EncoderInfo or None
        None at a server before any site has embedded.
    data : DataRecord or None
        None at the server.
    federation : dict of str to ClassCounts
        The class counts of every site, as the server published them.
    best : str or None
        The MLP with the best validation accuracy, for example ``"256-128-64"``; never chosen on test.
    rounds : dict of str to dict of str to int
        Best round by MLP and seed: ``{"32": {"0": 14}}``.
    sent : dict of str to Traffic
        What left this party, by kind: ``model``, ``metrics``, ``counts``, ``sums``, ``coordinates``, ``control``, ...
    remarks : list of str
        Sentences that a reader of the report must see, for example a site that abstained and why.
    """

    party: str
    role: Literal["server", "site", "central"]
    versions: dict[str, str] = {}
    settings: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    peak_memory_bytes: int = 0
    classes: list[str] = []
    encoder: EncoderInfo | None = None
    data: DataRecord | None = None
    federation: dict[str, ClassCounts] = {}
    best: str | None = None
    rounds: dict[str, dict[str, int]] = {}
    sent: dict[str, Traffic] = {}
    remarks: list[str] = []
    started: str = ""
    finished: str = ""
    format: Literal["fedbio-party"] = "fedbio-party"
    version: Literal[1] = 1


class Metric(NamedTuple):
    """One row of ``metrics.csv``.

    `party` is whose model it is: a site's name for the model that the site trained alone, `FEDERATED`, or `CENTRAL`.
    `split` is ``train``, ``validation`` or ``test``. `round` counts from 0; a test row carries the chosen round.
    `metric` is ``loss``, ``accuracy``, ``macro_f1`` or ``mcc``. `model` is the MLP, for example ``"256-128-64"``.
    """

    party: str
    model: str
    split: str
    seed: int
    round: int
    metric: str
    value: float


class Prediction(NamedTuple):
    """One row of ``predictions.csv``: what one model said of one test protein. `party` and `model` as in `Metric`."""

    id: str
    target: str
    party: str
    model: str
    seed: int
    predicted: str
    confidence: float


class MapPoint(NamedTuple):
    """One row of ``map.csv``: the 2-D coordinates of one protein, without its id."""

    site: str
    target: str
    split: str
    x: float
    y: float


METRICS_COLUMNS = Metric._fields
PREDICTIONS_COLUMNS = Prediction._fields
MAP_COLUMNS = MapPoint._fields


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC with milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def write_party(workspace: str | os.PathLike[str], record: PartyRecord) -> Path:
    """Write ``party.json`` in `workspace`, whole or not at all, and return its path."""
    path = Path(workspace) / PARTY_FILE
    write_whole(path, msgspec.json.format(msgspec.json.encode(record), indent=1))
    return path


def read_party(path: str | os.PathLike[str]) -> PartyRecord:
    """Read one ``party.json``.

    Raises
    ------
    FormatError
        If the file is not a party record of a version that this release can read.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=PartyRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: not a record that this release can read (format fedbio-party, version 1): {error}; "
            "run the job again, or use the release that wrote it"
        ) from error


def write_table(path: str | os.PathLike[str], columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Path:
    """Write rows as CSV with a header line, whole or not at all, and return the path."""
    target = Path(path)
    with whole_file(target) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    return target


class EventLog:
    """Append to ``events.jsonl``: who did what when, one JSON object a line, flushed at once.

    Parameters
    ----------
    workspace : path-like
        The party's folder; an existing log is continued.
    party : str
        The party's name, put into every event.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = EventLog(folder, "site-1")
    ...     log.write("task finished", task="train", round=3)
    ...     log.close()
    """

    def __init__(self, workspace: str | os.PathLike[str], party: str) -> None:
        path = Path(workspace) / EVENTS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.party = path, party
        self._file = open(path, "ab", buffering=0)
        self._lock = threading.Lock()
        self._always: dict[str, Any] = {}

    def bound(self, **details: Any) -> EventLog:
        """Return the same log with details that every event written through it gets, unless the event has its own."""
        twin = copy.copy(self)
        twin._always = {**self._always, **details}
        return twin

    def write(self, event: str, **details: Any) -> None:
        """Append one event; `details` are JSON values. Safe to call from several threads."""
        content = {"time": utc_now(), "party": self.party, "event": event, **self._always, **details}
        line = msgspec.json.encode(content) + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
