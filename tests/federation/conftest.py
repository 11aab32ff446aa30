"""A whole federation in one process: the memory driver, real endpoints, and sites that compute with NumPy alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fedbio.federation import Executor, FLModel, Server, Site, SiteContext, Task
from fedbio.federation.model import WEIGHT
from fedbio.federation.workflows.study import MEAN, Alone, Description, Evaluation, RunSpec, meta, read_meta
from fedbio.provision import provision
from fedbio.results import ClassCounts, EncoderInfo
from fedbio.settings import FederationFile, JobsFile, KitFile, load
from fedbio.transport import Credentials

WIDTH = 4
SITES = ("site-1", "site-2", "site-3")
addresses = itertools.count(1)


class _Fake(Executor):
    kind: ClassVar[str] = "train"
    leaves: ClassVar[str] = "model"

    def __init__(self, name: str, kind: str, answer: Callable[[FLModel, SiteContext], FLModel]) -> None:
        self.name, self.kind, self.answer = name, kind, answer  # type: ignore[misc]
        self.leaves = {"describe": "counts", "moments": "sums", "initialize": "model", "train": "model"}.get(  # type: ignore[misc]
            name, "metrics"
        )
        self.calls = 0

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        self.calls += 1
        return self.answer(model, context)


def proteins_of(site: str) -> int:
    """10 at site-1, 20 at site-2, 30 at site-3."""
    return 10 * int(site[-1])


def _describe(width: int, context: SiteContext) -> FLModel:
    counts = ClassCounts({"Nucleus": proteins_of(context.site)}, {"Nucleus": 5}, {"Nucleus": 2, "Plastid": 2})
    encoder = EncoderInfo("tiny", "0" * 64, True, width, "mean", 1, "float32", 128, "cut")
    return FLModel(meta=meta(Description(counts, encoder)))


def _moments(width: int, context: SiteContext) -> FLModel:
    count = proteins_of(context.site)
    return FLModel(params={"sum": np.zeros(width), "squares": np.full(width, float(count))}, meta={WEIGHT: count})


def _initialize(model: FLModel, context: SiteContext) -> FLModel:
    spec = read_meta(model.meta, RunSpec)
    hidden, width = int(spec.hidden), len(model.params[MEAN])
    return FLModel(
        params={
            "layers.0.weight": np.zeros((hidden, width), np.float32),
            "layers.0.bias": np.zeros(hidden, np.float32),
            "layers.1.weight": np.zeros((2, hidden), np.float32),
            "layers.1.bias": np.zeros(2, np.float32),
        }
    )


def _measured(model: FLModel) -> dict[str, float]:
    # the best model is that of round 2
    return {"validation_accuracy": 0.9 - 0.1 * abs(model.current_round - 2), "validation_loss": 1.0}


def _train(model: FLModel, context: SiteContext) -> FLModel:
    step = np.float32(context.site[-1])
    params = {name: value + step for name, value in model.params.items() if name.startswith("layers.")}
    return FLModel(
        params=params, metrics={**_measured(model), "train_loss": 0.5}, meta={WEIGHT: proteins_of(context.site)}
    )


def _evaluation() -> Evaluation:
    return Evaluation([[2, 0], [1, 1]], 0.25, [[0] * 50, [0] * 50])


def fakes(width: int = WIDTH) -> dict[str, Executor]:
    """Executors of a site whose training adds the site's number to every parameter."""
    found = [
        _Fake("describe", "statistics", lambda _, context: _describe(width, context)),
        _Fake("moments", "statistics", lambda _, context: _moments(width, context)),
        _Fake("initialize", "train", _initialize),
        _Fake("train", "train", _train),
        _Fake("validate", "train", lambda model, _: FLModel(metrics=_measured(model))),
        _Fake("train_alone", "train", lambda *_: FLModel(meta=meta(Alone(1, [(0, 0.5, 0.1, None)], _evaluation())))),
        _Fake("evaluate", "evaluate", lambda *_: FLModel(meta=meta(_evaluation()))),
        _Fake("publish", "publish", lambda *_: FLModel()),
    ]
    return {each.name: each for each in found}


def jobs(
    *, rounds: int = 3, seeds: Sequence[int] = (0,), mlp: str = "3", quantization: Any = None, **limits: Any
) -> JobsFile:
    """A study of one small classifier."""
    training = {"mlps": [mlp], "seeds": list(seeds), "rounds": rounds, "patience": 8}
    job = {
        "workflow": "classify",
        "classes": ["Nucleus", "Plastid"],
        "training": training,
        "quantization": quantization,
    }
    federation = {"join_deadline_s": 20, "round_deadline_s": 20, "heartbeat_s": 0.5, **limits}
    return JobsFile.model_validate({"jobs": [job], "federation": federation})


@dataclass
class Federation:
    """Kits for a server and three sites, and a pool to run them in."""

    folder: Path
    pool: ThreadPoolExecutor
    address: str = field(default_factory=lambda: f"memory:{next(addresses)}")

    fakes = staticmethod(fakes)
    jobs = staticmethod(jobs)

    def kit(self, party: str) -> KitFile:
        return load(self.folder / "kits" / party / "kit.yaml", KitFile)

    def credentials(self, party: str) -> Credentials:
        return Credentials.from_kit(self.folder / "kits" / party)

    def server(self, what: JobsFile, **options: Any) -> Server:
        options = {"listen": self.address, "driver": "memory", **options}
        return Server(
            kit=self.kit("server"),
            credentials=self.credentials("server"),
            jobs=what,
            workspace=self.folder / "server",
            **options,
        )

    def site(self, name: str, executors: Mapping[str, Executor] | None = None, **options: Any) -> Site:
        options = {
            "allow": ("statistics", "train", "evaluate", "publish"),
            "connect_deadline_s": 20,
            "server": self.address,
            "driver": "memory",
            **options,
        }
        return Site(
            kit=self.kit(name),
            credentials=self.credentials(name),
            workspace=self.folder / name,
            data=self.folder / f"{name}.fasta",
            executors=executors or fakes(),
            **options,
        )

    def start(self, party: Server | Site) -> Future[None]:
        return self.pool.submit(party.run)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    settings = {"federation": "test", "server": {"address": "localhost:1"}, "sites": list(SITES)}
    provision(FederationFile.model_validate(settings), tmp_path / "kits")
    with ThreadPoolExecutor(8) as pool:
        yield Federation(tmp_path, pool)
