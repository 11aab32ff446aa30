"""Three sites with real proteins, real embeddings and real training, and a server, in one process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedbio.encoder import embed_file
from fedbio.executors import registry
from fedbio.executors.publish import save_global
from fedbio.federation import Executor, Server, Site
from fedbio.proteins import Protein, partition, write_fasta
from fedbio.proteins.demo import generate
from fedbio.provision import provision
from fedbio.settings import FederationFile, JobsFile, KitFile, load
from fedbio.transport import Credentials

SITES = ("site-1", "site-2", "site-3")
ALLOW = ("embed", "statistics", "train", "evaluate", "publish")
addresses = itertools.count(1)


@dataclass
class Study:
    """A folder with kits and data for a whole job."""

    folder: Path
    proteins: dict[str, list[Protein]]
    encoder: Path
    address: str = field(default_factory=lambda: f"study:{next(addresses)}")

    def jobs(self, *, points: int | None = None, embed: bool = True, **training: Any) -> JobsFile:
        training = {"mlps": ["8", "8-4"], "seeds": [0], "rounds": 2, "patience": 4, **training}
        jobs: list[dict[str, Any]] = [{"workflow": "embed", "encoder": {"name": str(self.encoder)}}] if embed else []
        jobs.append({"workflow": "classify", "training": training})
        jobs += [{"workflow": "projection", "points": points}] if points else []
        limits = {"join_deadline_s": 30, "round_deadline_s": 60}
        return JobsFile.model_validate({"jobs": jobs, "federation": limits})

    def embed_all(self, *, pooling: Any = "mean") -> None:
        """Embed without a federation."""
        for site in SITES:
            embed_file(
                self.folder / f"{site}.fasta",
                self.folder / site / "embeddings.h5",
                encoder=self.encoder,
                pooling=pooling,
                threads=1,
            )

    def run(
        self,
        jobs: JobsFile,
        *,
        executors: Mapping[str, Mapping[str, Executor]] | None = None,
        allow: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Run all parties to their end; raises what the server raised."""
        kits = self.folder / "kits"
        server = Server(
            kit=load(kits / "server/kit.yaml", KitFile),
            credentials=Credentials.from_kit(kits / "server"),
            jobs=jobs,
            workspace=self.folder / "server",
            listen=self.address,
            save_model=lambda params, publication: save_global(self.folder / "server", params, publication),
            driver="memory",
        )
        sites = [
            Site(
                kit=load(kits / name / "kit.yaml", KitFile),
                credentials=Credentials.from_kit(kits / name),
                workspace=self.folder / name,
                data=self.folder / f"{name}.fasta",
                executors=(executors or {}).get(name) or registry(),
                allow=(allow or {}).get(name, ALLOW),
                server=self.address,
                connect_deadline_s=30,
                threads=1,
                driver="memory",
            )
            for name in SITES
        ]
        with ThreadPoolExecutor(len(SITES) + 1) as pool:
            running = [pool.submit(party.run) for party in (server, *sites)]
            for each in running:
                each.result(120)


@pytest.fixture
def study(tmp_path: Path, small_encoder: Path) -> Study:
    settings = {"federation": "test", "server": {"address": "localhost:1"}, "sites": list(SITES)}
    provision(FederationFile.model_validate(settings), tmp_path / "kits")
    shares = partition(list(generate(240, seed=1)), SITES, alpha=5.0, seed=0)
    for site, proteins in shares.items():
        write_fasta(proteins, tmp_path / f"{site}.fasta")
    return Study(tmp_path, shares, small_encoder)
