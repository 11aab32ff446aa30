"""Federated evaluation: every model is tried on every site's data, where the data are; the answer is a matrix.

Roth et al. 2022, "NVIDIA FLARE: Federated Learning from Simulation to Real-World", arXiv:2210.13291.
"""

from __future__ import annotations

__all__ = ["EVALUATION_FILE", "CrossSiteEvaluation", "Row"]

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedbio.errors import FederationError, SettingsError
from fedbio.federation.acceptance import ANY_TENSORS
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Result
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.script import EVALUATE, SUBMIT_MODEL
from fedbio.federation.workflows.site_metrics import named_metrics
from fedbio.files import sha256_file
from fedbio.results import Metric, write_table
from fedbio.settings_jobs import EvaluationJob
from fedbio.tensors import open_file

log = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.csv"
COLUMNS = ("model", "site", "metric", "value")

SUFFIX = ".safetensors"

NO_SCRIPT = "it has not taken the job's script, or registers no examples"


class Row(msgspec.Struct, frozen=True):
    """What became of one model.

    Parameters
    ----------
    metrics : dict of str to dict of str to float
        What each site has measured, by site and metric.
    empty : dict of str to str
        Why the other sites have not, by site.
    """

    metrics: dict[str, dict[str, float]] = {}
    empty: dict[str, str] = {}


class CrossSiteEvaluation(Controller):
    """Collects models and has every site try each of them.

    The models are safetensors files of the job, known by their file names, and those that the sites' scripts submit,
    known by the name in the certificate of the site that sent them. Every site gets every model, one after the other.
    A model that is not submitted, or that a site cannot try, leaves an empty cell and an event "cell empty" with the
    reason. ``models/JOB/evaluation.csv`` is the matrix in long form: model, site, metric, value; in the server's state
    it is the metrics of split ``test`` with the site as party.

    Killed and started again, the server asks for no model and tries no model twice.

    Parameters
    ----------
    runtime : Runtime
    job : EvaluationJob
    """

    def __init__(self, runtime: Runtime, job: EvaluationJob) -> None:
        super().__init__(runtime)
        self.settings = job
        self.deployment = Deployment(self, job, 1)
        self.files = {name: runtime.code / name for name in job.models}
        wrong = [str(path) for name, path in self.files.items() if not (name.endswith(SUFFIX) and path.is_file())]
        if wrong:
            raise SettingsError(
                f"job {self.job}: models: {', '.join(wrong)}: expected safetensors files ({SUFFIX}) beside the job file"
            )
        if not (self.files or job.sites):
            raise SettingsError(f"job {self.job}: no model to try; name some (models), or try the sites' own (sites)")
        self.folder = runtime.workspace / "models" / runtime.job

    def run(self) -> dict[str, Row]:
        """Fill the matrix; return its rows by model."""
        for path in self.files.values():
            open_file(path)  # a damaged file is told of before anybody has worked
        sites = self.all_sites()
        if self.settings.sites:
            self.collect(sites)
        rows: dict[str, Row] = {}
        for name in (*self.files, *(sites if self.settings.sites else ())):
            rows[name] = self.state.noted(self.job, _row(name), Row) or self.fill(name, sites)
        self.write(sites, rows)
        self.deployment.end()
        return rows

    def all_sites(self) -> tuple[str, ...]:
        """Return the sites of the matrix: those that were here when it was begun, also if they fail later."""
        sites = self.state.noted(self.job, "sites", tuple[str, ...])
        if sites is None:
            sites = self.sites()
            self.state.note(self.job, "sites", sites)
        return sites

    def ready(self, sites: Sequence[str]) -> list[str]:
        """Return those that have taken the script; one of them that is away now is waited for with its task."""
        self.deployment.sites()
        return [site for site in sites if self.deployment.examples.get(site)]

    def collect(self, sites: Sequence[str]) -> None:
        """Ask every site that has not submitted its model yet for it."""
        lacking = [
            site
            for site in sites
            if self.state.noted(self.job, _submitted(site), str) is None
            and self.state.noted(self.job, _row(site), Row) is None
        ]
        ready = self.ready(lacking)
        missing = {site: NO_SCRIPT for site in lacking if site not in ready}
        self.broadcast_and_wait(
            SUBMIT_MODEL,
            FLModel(),
            ready,
            min_responses=0,
            expect=ANY_TENSORS,
            on_result=self.submitted,
            missing=missing,
        )
        for site, reason in missing.items():
            self.runtime.events.write("model not submitted", job=self.job, site=site, reason=reason)
            self.state.note(self.job, _row(site), Row(empty=dict.fromkeys(sites, f"no model was submitted: {reason}")))

    def submitted(self, result: Result) -> None:
        """Keep a site's model under the name in its certificate."""
        params = {name: result.model.params[name] for name in sorted(result.model.params)}
        self.state.store(self.job, _submitted(result.site), params)
        path = self.path(result.site)
        digest = sha256_file(path)
        self.runtime.events.write(
            "model submitted", job=self.job, site=result.site, sha256=digest, bytes=path.stat().st_size
        )
        self.state.note(self.job, _submitted(result.site), digest)

    def path(self, name: str) -> Path:
        """Return the file of a model: the job's own, or that of a site."""
        return self.files.get(name) or self.folder / f"{_submitted(name)}{SUFFIX}"

    def fill(self, name: str, sites: Sequence[str]) -> Row:
        """Have every site try one model, and note what they have measured."""
        ready = self.ready(sites)
        missing = {site: NO_SCRIPT for site in sites if site not in ready}
        results = self.broadcast_and_wait(
            EVALUATE,
            FLModel(params=open_file(self.path(name))),
            ready,
            min_responses=0,
            missing=missing,
        )
        found = {each.site: named_metrics(each.model.metrics) for each in results}
        missing |= {site: "its script reports no metric" for site, metrics in found.items() if not metrics}
        row = Row({site: metrics for site, metrics in found.items() if metrics}, missing)
        self.state.add_metrics(
            self.job,
            [
                Metric(site, name, "test", 0, 0, metric, value)
                for site, metrics in row.metrics.items()
                for metric, value in metrics.items()
            ],
        )
        self.state.note(self.job, _row(name), row)
        log.info("model tried job=%s model=%s sites=%d", self.job, name, len(row.metrics))
        return row

    def write(self, sites: Sequence[str], rows: dict[str, Row]) -> None:
        """Write the matrix, with the reason of every empty cell as an event."""
        metrics = sorted({metric for row in rows.values() for found in row.metrics.values() for metric in found})
        if not metrics:
            reasons = "; ".join(f"{site}: {reason}" for row in rows.values() for site, reason in row.empty.items())
            raise FederationError(f"job {self.job}: no site could try any model; {reasons}")
        for name, row in rows.items():
            for site, reason in sorted(row.empty.items()):
                self.runtime.events.write("cell empty", job=self.job, model=name, site=site, reason=reason)
        write_table(
            self.folder / EVALUATION_FILE,
            COLUMNS,
            (
                (name, site, metric, row.metrics.get(site, {}).get(metric, ""))
                for name, row in rows.items()
                for site in sites
                for metric in metrics
            ),
        )


def _row(name: str) -> str:
    return f"row {name}"


def _submitted(site: str) -> str:
    return f"submitted/{site}"
