"""Invented runs for the report, written through the writers that real parties use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedbio.report import Run, collect, study, write_page
from fedbio.results import (
    CENTRAL,
    FEDERATED,
    MAP_COLUMNS,
    MAP_FILE,
    METRICS_COLUMNS,
    METRICS_FILE,
    PREDICTIONS_COLUMNS,
    PREDICTIONS_FILE,
    ClassCounts,
    DataRecord,
    EncoderInfo,
    EventLog,
    MapPoint,
    Metric,
    PartyRecord,
    Prediction,
    Traffic,
    write_party,
    write_table,
)
from fedbio.settings import COMPARTMENTS

MLPS = ("32", "128-64", "256-128-64", "512-256-128-64")
SHARES = np.array([0.10, 0.18, 0.06, 0.14, 0.03, 0.03, 0.11, 0.29, 0.02, 0.04])


class InventedRun:
    """A federation whose models are right with a set probability; proteins differ in difficulty for all of them."""

    def __init__(
        self,
        folder: Path,
        *,
        sites: int = 3,
        mlps: tuple[str, ...] = MLPS,
        seeds: tuple[int, ...] = (0, 1, 2),
        rounds: int = 25,
        proteins: int = 900,
        alone: float = 0.56,
        gain: float = 0.12,
        central: bool = True,
        with_map: bool = True,
        absent: str | None = None,
        trained: bool = False,
        perplexity: float | None = None,
        synthetic: bool = True,
    ) -> None:
        self.folder, self.mlps, self.seeds, self.rounds = folder, mlps, seeds, rounds
        self.alone, self.gain, self.with_map, self.synthetic = alone, gain, with_map, synthetic
        self.random = np.random.default_rng(42)
        shares = np.where([name == absent for name in COMPARTMENTS], 0.0, SHARES)
        shares = shares / shares.sum()
        self.names = [f"site-{number}" for number in range(1, sites + 1)]
        tests = proteins // 5
        self.targets = self.random.choice(10, size=tests, p=shares)
        self.difficulty = self.random.uniform(size=tests)
        dealt = self.random.dirichlet([1.0] * sites, size=10)  # class by site
        totals = (proteins - tests) * SHARES
        self.counts = {
            name: ClassCounts(
                train=self.by_class(totals * dealt[:, site] * 0.9),
                validation=self.by_class(totals * dealt[:, site] * 0.1),
                test=self.by_class(np.bincount(self.targets, minlength=10)),
            )
            for site, name in enumerate(self.names)
        }
        self.encoder = EncoderInfo(
            name="esm1nv-44m",
            weights_sha256="3f1c9ad2" * 8,
            trained=trained,
            width=768,
            pooling="mean",
            layer=6,
            dtype="float32",
            max_residues=510,
            long="cut",
            perplexity=perplexity,
        )
        self.curves: dict[tuple[str, str, int], tuple[int, list[Metric]]] = {}
        for party in (*self.names, FEDERATED, CENTRAL):
            for size, mlp in enumerate(mlps):
                for seed in seeds:
                    self.curves[party, mlp, seed] = self.curve(party, mlp, seed, self.ability(party, size))
        self.answers = {key: self.answer(*key) for key in self.curves}
        self.server()
        for name in self.names:
            self.party(name, "site", (name, FEDERATED))
        if central:
            self.party(CENTRAL, "central", (CENTRAL,))

    @staticmethod
    def by_class(counts: np.ndarray) -> dict[str, int]:
        return {name: int(count) for name, count in zip(COMPARTMENTS, counts, strict=True) if count >= 1}

    def ability(self, party: str, size: int) -> float:
        above = {FEDERATED: self.gain, CENTRAL: max(self.gain, 0) * 1.25}.get(party)
        if above is None:
            above = 0.04 * (1 - self.names.index(party))
        return self.alone + above + 0.03 * (size - 1) * (1 if size < 3 else 0.4)

    def curve(self, party: str, mlp: str, seed: int, ability: float) -> tuple[int, list[Metric]]:
        """Return the best round and all rows of one training."""
        speed = 3.0 if party == CENTRAL else 5.0
        accuracy = ability * (1 - 0.75 * np.exp(-np.arange(self.rounds) / speed))
        accuracy = np.clip(accuracy + self.random.normal(0, 0.012, self.rounds), 0, 0.97)
        best = int(np.argmax(accuracy))
        rows = [
            Metric(party, mlp, split, seed, index, metric, round(float(value), 6))
            for index in range(min(self.rounds, best + 9))
            for split, metric, value in (
                ("train", "loss", 2.3 * (1 - accuracy[index])),
                ("validation", "loss", 2.5 * (1 - accuracy[index])),
                ("validation", "accuracy", accuracy[index]),
            )
        ]
        return best, rows

    def answer(self, party: str, mlp: str, seed: int) -> np.ndarray:
        ability = self.ability(party, self.mlps.index(mlp))
        weight = np.where(self.targets == 8, 0.5, 1.0)  # the rarest class is harder
        right = self.random.uniform(size=len(self.targets)) < np.clip(
            weight * ability + 0.5 * (0.5 - self.difficulty), 0, 1
        )
        # half of the mistakes go to the class that follows, as Nucleus and Cytoplasm are confused in real data
        near = np.where(self.random.uniform(size=len(right)) < 0.5, (self.targets + 9) % 10, 7)
        wrong = np.where(near == self.targets, 1, near)
        return np.where(right, self.targets, wrong)

    def predictions(self, party: str) -> list[Prediction]:
        return [
            Prediction(f"P{index:05d}", COMPARTMENTS[target], party, mlp, seed, COMPARTMENTS[said], 0.5)
            for (who, mlp, seed), answers in self.answers.items()
            if who == party
            for index, (target, said) in enumerate(zip(self.targets, answers, strict=True))
        ]

    def metrics(self, party: str) -> list[Metric]:
        rows: list[Metric] = []
        for (who, mlp, seed), (best, curve) in self.curves.items():
            if who == party:
                accuracy = float(np.mean(self.answers[who, mlp, seed] == self.targets))
                rows += [*curve, Metric(who, mlp, "test", seed, best, "accuracy", round(accuracy, 6))]
        return rows

    def record(self, party: str, role: str) -> PartyRecord:
        return PartyRecord(
            party=party,
            role=role,  # type: ignore[arg-type]
            versions={"fedbio": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
            settings={
                "training": {"mlps": list(self.mlps), "seeds": list(self.seeds), "rounds": self.rounds, "dropout": 0.2},
                "sites": {"count": len(self.names), "by": "dirichlet", "alpha": 1.0},
            },
            classes=list(COMPARTMENTS),
            encoder=self.encoder,
            federation=self.counts,
            best="256-128-64" if "256-128-64" in self.mlps else self.mlps[-1],
            started="2026-01-05T09:00:00.000+00:00",
            finished="2026-01-05T09:03:21.500+00:00",
        )

    def server(self) -> None:
        folder = self.folder / "server"
        record = self.record("server", "server")
        record.seconds = {"embed": 64.0, "describe": 0.4, "train": 71.2, "evaluate": 3.1}
        record.peak_memory_bytes = 96_000_000
        record.rounds = {mlp: {str(seed): self.curves[FEDERATED, mlp, seed][0] for seed in self.seeds}
                         for mlp in self.mlps}  # fmt: skip
        record.sent = {"model": Traffic(900, 640_000_000), "control": Traffic(2_000, 400_000)}
        write_party(folder, record)
        write_table(folder / METRICS_FILE, METRICS_COLUMNS, self.metrics(FEDERATED))
        self.log(folder, "server", ["job started", "round finished", "job finished"])

    def party(self, name: str, role: str, tells: tuple[str, ...]) -> None:
        folder = self.folder / name
        record = self.record(name, role)
        record.seconds = {"embed": 58.3, "train": 32.1, "alone": 24.9} if role == "site" else {"train": 41.0}
        record.peak_memory_bytes = 812_000_000
        if role == "site":
            counts = self.counts[name]
            total = sum(sum(each.values()) for each in (counts.train, counts.validation, counts.test))
            record.data = DataRecord(f"{name}.fasta", self.synthetic, total, total * 317, total // 20, counts)
            record.sent = {
                "model": Traffic(300, 214_000_000),
                "metrics": Traffic(912, 310_000),
                "counts": Traffic(1, 612),
                "sums": Traffic(2, 12_400),
                "control": Traffic(1_830, 92_000),
            }
            if self.with_map:
                record.sent["coordinates"] = Traffic(1, 6_240)
                write_table(folder / MAP_FILE, MAP_COLUMNS, self.points(name))
        write_party(folder, record)
        # the server tells every site all curves
        curves = [
            row for who in (tells if role == "central" else (*self.names, FEDERATED)) for row in self.metrics(who)
        ]
        write_table(folder / METRICS_FILE, METRICS_COLUMNS, curves)
        write_table(
            folder / PREDICTIONS_FILE, PREDICTIONS_COLUMNS, [row for who in tells for row in self.predictions(who)]
        )
        self.log(folder, name, ["task started", "task finished"])

    def points(self, name: str) -> list[MapPoint]:
        return [
            MapPoint(name, label, "train", round(float(x), 4), round(float(y), 4))
            for label, count in self.counts[name].train.items()
            for x, y in self.random.normal(0, 0.8, (count, 2))
            + 2.4 * np.array([np.cos(COMPARTMENTS.index(label) * 0.628), np.sin(COMPARTMENTS.index(label) * 0.628)])
        ]

    @staticmethod
    def log(folder: Path, party: str, events: list[str]) -> None:
        log = EventLog(folder, party)
        for event in events:
            log.write(event)
        log.close()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three sites, ten classes, four MLPs, three seeds, 25 rounds."""
    folder = tmp_path_factory.mktemp("whole") / "demo"
    InventedRun(folder)
    return collect(folder)


@pytest.fixture(scope="session")
def whole_page(whole_run: Run) -> Path:
    """The report of the whole run."""
    return write_page(study(whole_run), whole_run.folder / "report.html")


@pytest.fixture
def invent(tmp_path: Path) -> Callable[..., Path]:
    """Write an invented run and return its folder; small unless told otherwise."""

    def write(**options: object) -> Path:
        folder = tmp_path / "run"
        InventedRun(folder, **{"mlps": ("32",), "seeds": (0,), "rounds": 4, **options})  # type: ignore[arg-type]
        return folder

    return write
