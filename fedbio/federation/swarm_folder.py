"""What a site keeps of swarm learning: models by round, the update of the round under way, and at the end two models.

A model's file name says its round and the exchange in which it was made, so that what is there needs no index that
could disagree with it. Files appear whole or not at all.
"""

from __future__ import annotations

__all__ = ["ModelName", "SwarmFolder", "Update", "has_begun", "model_name"]

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fedbio.errors import ProtocolError
from fedbio.federation.model import Parameters
from fedbio.files import sha256_file, whole_file, write_whole
from fedbio.tensors import open_file, write_file

_RUN = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MODEL = re.compile(r"round-(\d+)-(\d+)\.safetensors")
MOST = 10**9
"""The largest round or exchange."""


class ModelName(NamedTuple):
    """A model's round, and the exchange in which it was made."""

    round: int
    tag: int

    def __str__(self) -> str:
        return f"{self.round:05}-{self.tag:05}"


class Update(msgspec.Struct, frozen=True):
    """A site's own training of one model; its parameters are beside it unless its weight is 0."""

    weight: float
    metrics: dict[str, float]
    params: Parameters = {}


class SwarmFolder:
    """A job's folder at one site.

    Parameters
    ----------
    workspace : Path
        The site's own.
    job, run : str
        As the server says them; work of other runs of the job is removed.

    Raises
    ------
    ProtocolError
        If they cannot be names of folders.
    """

    def __init__(self, workspace: Path, job: str, run: str) -> None:
        if not (_NAME.fullmatch(job) and _RUN.fullmatch(run)):
            raise ProtocolError(f"job {job[:80]!r}, run {run[:80]!r}: not names; do both ends run one release?")
        self.job, self.run = job, run
        self.path = _folder(workspace, job)
        self._work = self.path / f"run-{run}"
        for other in self.path.glob("run-*"):
            if other != self._work:
                shutil.rmtree(other)
        self._work.mkdir(parents=True, exist_ok=True)

    def held(self) -> tuple[ModelName, ...]:
        """Return the models that are here."""
        found = (_MODEL.fullmatch(path.name) for path in self._work.iterdir())
        return tuple(sorted(ModelName(int(match[1]), int(match[2])) for match in found if match))

    def model(self, name: ModelName) -> Parameters:
        """Return a model that is here."""
        if name not in self.held():
            raise ProtocolError(f"the model of round {name.round} (exchange {name.tag}) is not here")
        return open_file(self._model(name))

    def put(self, name: ModelName, params: Parameters) -> None:
        """Keep a model."""
        write_file(self._model(name), params)

    def propose(self, name: ModelName, params: Parameters) -> None:
        """Keep a model that counts only when the server has it; an older one of this kind goes."""
        for path in self._work.glob("candidate-*"):
            path.unlink()
        write_file(self._candidate(name), params)

    def adopt(self, name: ModelName) -> None:
        """Let a model that was proposed here count."""
        if name not in self.held():
            try:
                self._candidate(name).replace(self._model(name))
            except FileNotFoundError as error:
                raise ProtocolError(f"no model of round {name.round} was made here in exchange {name.tag}") from error

    def keep_only(self, names: Collection[ModelName]) -> None:
        """Remove the models and updates that nobody will ask for."""
        stay = {str(name) for name in names}
        for path in self._work.iterdir():
            kind, _, rest = path.name.partition("-")
            if kind == "candidate" or (kind in ("round", "update") and rest.split(".")[0] not in stay):
                path.unlink()

    def update(self, name: ModelName) -> Update | None:
        """Return the update that this site made of a model, if it did."""
        path = self._update(name)
        if not path.exists():
            return None
        found = msgspec.json.decode(path.read_bytes(), type=Update)
        params = open_file(path.with_suffix(".safetensors")) if found.weight else {}
        return msgspec.structs.replace(found, params=params)

    def put_update(self, name: ModelName, update: Update) -> None:
        """Keep this site's update of a model, so that a round that is repeated needs no second training."""
        if update.weight:
            write_file(self._update(name).with_suffix(".safetensors"), update.params)
        write_whole(self._update(name), msgspec.json.encode(msgspec.structs.replace(update, params={})))

    def publish(self, best: ModelName, last: ModelName, **card: Any) -> dict[str, Any]:
        """Give the best and the last model their names, remove the rest, and return what was written of them."""
        for title, name in (("best", best), ("last", last)):
            target = self.path / f"{title}.safetensors"
            with whole_file(target) as beside:
                shutil.copyfile(self._model(name), beside)
            card[title] = {"round": name.round, "sha256": sha256_file(target)}
        # it names the digests of the other two, so it comes last
        write_whole(self.path / "model.json", msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
        return card

    def _model(self, name: ModelName) -> Path:
        return self._work / f"round-{name}.safetensors"

    def _candidate(self, name: ModelName) -> Path:
        return self._work / f"candidate-{name}.safetensors"

    def _update(self, name: ModelName) -> Path:
        return self._work / f"update-{name}.json"


def has_begun(workspace: Path, job: str) -> bool:
    """Whether a job of this name was a swarm's here, also in a former process."""
    return _NAME.fullmatch(job) is not None and _folder(workspace, job).exists()


def _folder(workspace: Path, job: str) -> Path:
    return workspace / "swarm" / job


def model_name(number: int, tag: int) -> ModelName:
    """Return a name that the server said, once it is sound."""
    if not (0 <= number <= MOST and 0 <= tag <= MOST):
        raise ProtocolError(f"round {number} of exchange {tag} is none; do both ends run one release?")
    return ModelName(number, tag)
