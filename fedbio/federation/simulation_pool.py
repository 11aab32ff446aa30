"""Play a federation on a pool of processes: the server in this one, without a network, and its sites in the others."""

from __future__ import annotations

__all__ = ["play"]

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedbio.errors import FedbioError, FederationError, SettingsError
from fedbio.federation.policy import ANY
from fedbio.federation.pool import Pool
from fedbio.federation.pool_messages import Orders, SiteSpec
from fedbio.federation.server import Server
from fedbio.settings import SCHEMES, JobsFile, KitFile, SiteSettings, load
from fedbio.transport import Credentials

if TYPE_CHECKING:
    from fedbio.federation.simulation import Simulation

EXECUTORS, PREPARE = "fedbio.executors:registry", "fedbio.executors:load_libraries"

RESIDENT = 1_000
"""The most sites that a process keeps in memory; further ones read their data again with every task."""

SHARE = 0.5
"""Of the memory that is free at the beginning, how much all processes together may take to keep sites in it."""

STREAMING = ("split",)
"""Workflows whose sites send to each other while they compute."""


def play(what: Simulation, run: Path, kits: Path, processes: int) -> None:
    """Run the jobs in ``kits/jobs.yaml`` to their end.

    Raises
    ------
    SettingsError
        If a job needs streams between processes of their own.
    FedbioError
        If the jobs fail: the error of the site that is to blame, or the server's.
    """
    _check(what.jobs)
    pool = Pool(
        orders=Orders(
            sites=[SiteSpec(name, str(kits / name), str(data), str(run / name)) for name, data in what.sites.items()],
            executors=EXECUTORS,
            prepare=PREPARE,
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
        save_model=lambda params, publication: what.save_model(run / "server" / "global", params, publication),
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


def _check(jobs: JobsFile) -> None:
    for job in jobs.jobs:
        streams = job.workflow in STREAMING or getattr(job, "aggregation", None) == "lockstep"
        if streams:
            what = "its workflow" if job.workflow in STREAMING else "aggregation: lockstep"
            raise SettingsError(
                f"job {job.name}: {what} streams between processes, and a pool has none for each site; run it with "
                "--pool 0 (each site a process of its own)"
            )


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
