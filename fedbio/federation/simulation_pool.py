"""Play a federation on a pool of processes: the server in this one, without a network, and its sites in the others."""

from __future__ import annotations

__all__ = ["play"]

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedbio.errors import FedbioError, FederationError
from fedbio.federation.policy import ANY
from fedbio.federation.pool import Pool
from fedbio.federation.pool_messages import Orders, SiteSpec
from fedbio.federation.server import Server
from fedbio.settings import SCHEMES, JobsFile, KitFile, SiteSettings, load
from fedbio.settings_jobs import SplitJob
from fedbio.transport import Credentials

if TYPE_CHECKING:
    from fedbio.federation.simulation import Simulation

EXECUTORS, PREPARE = "fedbio.executors:registry", "fedbio.executors.pool:prepare"

RESIDENT = 1_000
"""The most sites that a process keeps in memory; further ones read their data again with every task."""

SHARE = 0.5
"""Of the memory that is free at the beginning, how much all processes together may take to keep sites in it."""


def play(what: Simulation, run: Path, kits: Path, processes: int) -> None:
    """Run the jobs in ``kits/jobs.yaml`` to their end.

    Raises
    ------
    FedbioError
        If the jobs fail: the error of the site that is to blame, or the server's.
    """
    pool = Pool(
        orders=Orders(
            sites=[SiteSpec(name, str(kits / name), str(data), str(run / name)) for name, data in what.sites.items()],
            executors=EXECUTORS,
            prepare=PREPARE,
            workflows=sorted({job.workflow for job in what.jobs.jobs}),
            folders=[],
            prefix="",
            resident=RESIDENT,
            memory_bytes=int(SHARE * _free_bytes() / processes),
            allow=list(dict.fromkeys([*SiteSettings.model_fields["allow"].default, *what.allow])),
            code=[ANY] if "code" in what.allow else [],
            quantization=list(SCHEMES),
            device=what.device,
            reuse=what.embeddings,
            threads=what.threads,
            synthetic=what.synthetic,
        ),
        processes=min(processes, len(what.sites)),
        environment=_environment(what.threads),
        folder=run / "pool",
        # each of the two sites of a cut network waits for the other one in every step
        alone={site for job in what.jobs.jobs if isinstance(job, SplitJob) for site in (job.bottom, job.top)},
    )
    failures: list[FedbioError] = []

    def fail(error: FedbioError) -> None:
        failures.append(error)
        server.give_up(error)

    server = Server(
        kit=load(kits / "server" / "kit.yaml", KitFile),
        credentials=Credentials.from_kit(kits / "server"),
        jobs=load(kits / "jobs.yaml", JobsFile),
        workspace=run / "server",
        listen="",
        code=kits,
        save_model=lambda params, publication: what.save_model(run / "server", params, publication),
        endpoint=pool.endpoint(fail),
    )
    with _log_in(run / "server" / "log.txt"):
        try:
            server.run()
        except FederationError:
            if not failures:
                raise
    if failures:
        # one that only lost the others comes after one whose data or code is wrong
        raise min(failures, key=lambda error: isinstance(error, FederationError))


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes) << 10


def _environment(threads: int) -> dict[str, str]:
    # read by torch and by NumPy's BLAS when they load
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, "PYTHONUNBUFFERED": "1", **dict.fromkeys(names, str(threads))}


@contextlib.contextmanager
def _log_in(path: Path) -> Iterator[None]:
    """Keep what is logged meanwhile, as a process of the server's own would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
