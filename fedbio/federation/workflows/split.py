"""Split learning: a network is cut in two, and each part stays at the site that trains it.

Gupta & Raskar 2018, "Distributed learning of deep neural network over multiple agents"; Vepakomma et al. 2018, "Split
learning for health: Distributed deep learning without sharing raw patient data". The server only passes on what the two
sites send each other (`fedbio.federation.split_relay`): activations one way, gradients the other.
"""

from __future__ import annotations

__all__ = ["Split"]

import logging
import uuid
from collections.abc import Mapping

import msgspec

from fedbio.errors import FederationError, SettingsError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Result
from fedbio.federation.split_relay import SplitRelay
from fedbio.federation.workflows.deployment import Deployment
from fedbio.federation.workflows.split_words import ALIGN, FINISH, LOSS, MEET, TRAIN, Aligned, Met, SplitOrder
from fedbio.federation.workflows.study import meta, read_meta
from fedbio.results import FEDERATED, Metric
from fedbio.settings_jobs import SplitJob

log = logging.getLogger(__name__)

NOTE = "split"
"""Under which the server's state keeps how far a job has come."""

TRIES = 3
"""How often an epoch is begun that a lost connection has broken off."""


class _Noted(msgspec.Struct, frozen=True):
    """How far a job has come: its run, the epochs that are done, and how many rows the sites have in common."""

    run: str
    epochs: int = 0
    rows: int = 0


class Split(Controller):
    """Trains a network of two parts for some epochs.

    Each epoch is one task to both sites and one session between them. When both have answered, both have written a
    checkpoint, and the epoch counts. One that is broken off by a lost connection is repeated from there when both sites
    are back, within the round's deadline each time.

    Parameters
    ----------
    runtime : Runtime
    job : SplitJob
    """

    def __init__(self, runtime: Runtime, job: SplitJob) -> None:
        super().__init__(runtime)
        self.settings = job
        self.pair = (job.bottom, job.top)
        if unknown := sorted(set(self.pair) - set(runtime.desk.expected)):
            raise SettingsError(
                f"job {self.job}: bottom and top: {', '.join(unknown)} takes no part here; the sites are "
                f"{', '.join(runtime.desk.expected)}"
            )
        if runtime.split is None:
            raise FederationError(f"job {self.job}: this server passes nothing on between sites")
        self.passages: SplitRelay = runtime.split
        self.deployment = Deployment(self, job, job.epochs)
        self._aligned: dict[str, int] = {}
        self._session = ""

    def sites(self) -> tuple[str, ...]:
        """Return the two sites of this job; wait for them if need be."""
        here = self.runtime.desk.sites(self.job)
        if not set(self.pair) <= set(here):
            self.runtime.desk.wait_for_sites(
                self.job,
                deadline_s=self.runtime.limits.round_deadline_s,
                gather_s=0,
                all_of=sorted(self.pair),
            )
        return tuple(sorted(self.pair))

    def run(self) -> None:
        """Train until the epochs are over; each site keeps its own part."""
        noted = self.state.noted(self.job, NOTE, _Noted) or _Noted(run=uuid.uuid4().hex)
        self.state.note(self.job, NOTE, noted)
        tries = 0
        while True:
            before = self._arrivals()
            try:
                noted = self.gather(noted)
                if noted.epochs == self.settings.epochs:
                    self.ask(FINISH, noted)
                    break
                noted = self.train(noted)
                tries = 0
            except FederationError as error:
                lost = self.passages.lost(self._session)
                tries += 1
                if tries == TRIES or not (lost or self._arrivals() != before):
                    raise
                log.warning("epoch broken off job=%s epoch=%d reason=%s", self.job, noted.epochs, error)
                self.runtime.events.write(
                    "epoch broken off", job=self.job, epoch=noted.epochs, reason=lost or str(error)
                )
            finally:
                self.passages.close(self._session)
        self.deployment.end()

    def gather(self, noted: _Noted) -> _Noted:
        """See that both sites have the script, and know which rows they have in common."""
        if missing := sorted(set(self.pair) - set(self.deployment.sites())):
            raise FederationError(f"job {self.job}: {', '.join(missing)} has not taken the script; both sites need it")
        arrivals = self._arrivals()
        if self._aligned == arrivals:
            return noted
        # a site that was started anew has no keys and no rows
        session = uuid.uuid4().hex
        met = {each.site: read_meta(each.model.meta, Met) for each in self.ask(MEET, noted, session=session)}
        self._open(session, 2)
        results = self.ask(
            ALIGN, noted, session=session, introductions={site: each.introduction for site, each in met.items()}
        )
        rows = {each.site: read_meta(each.model.meta, Aligned).rows for each in results}
        found = rows[self.settings.bottom]
        if len(set(rows.values())) != 1 or found < 1:
            raise FederationError(
                f"job {self.job}: the sites have {rows} rows in common; both must find the same proteins, by their ids"
            )
        if noted.rows not in (0, found):
            raise FederationError(
                f"job {self.job}: the sites have {found} rows in common and had {noted.rows} when it began; take "
                "back the change of the data, or start the job under another name"
            )
        self._aligned = arrivals
        noted = msgspec.structs.replace(noted, rows=found)
        self.state.note(self.job, NOTE, noted)
        self.runtime.events.write("rows agreed", job=self.job, rows=found)
        return noted

    def train(self, noted: _Noted) -> _Noted:
        """Have both sites train for one epoch, and note it."""
        session = uuid.uuid4().hex
        self._open(session, 2 * -(-noted.rows // self.settings.batch_size))
        results = self.ask(TRAIN, noted, session=session)
        [loss] = [each.model.metrics.get(LOSS) for each in results if each.site == self.settings.top]
        if loss is None:
            raise FederationError(f"job {self.job}: {self.settings.top} has reported no loss of epoch {noted.epochs}")
        noted = msgspec.structs.replace(noted, epochs=noted.epochs + 1)
        self.state.add_metrics(
            self.job, [Metric(FEDERATED, self.job, "train", self.settings.seed, noted.epochs, "loss", loss)]
        )
        self.state.note(self.job, NOTE, noted)
        log.info("epoch done job=%s epoch=%d of=%d loss=%.4f", self.job, noted.epochs, self.settings.epochs, loss)
        self.runtime.events.write("epoch", job=self.job, epoch=noted.epochs, loss=loss)
        return noted

    def ask(
        self, task: str, noted: _Noted, *, session: str = "", introductions: Mapping[str, bytes] | None = None
    ) -> list[Result]:
        """Hand a task to both sites and wait for both."""
        order = SplitOrder(
            run=noted.run,
            session=session,
            bottom=self.settings.bottom,
            top=self.settings.top,
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            rows=noted.rows,
            introductions=dict(introductions or {}),
        )
        model = FLModel(meta=meta(order), current_round=noted.epochs, total_rounds=self.settings.epochs)
        return self.broadcast_and_wait(task, model, sorted(self.pair), min_responses=2)

    def _open(self, session: str, messages: int) -> None:
        self.passages.close(self._session)
        self._session = session
        self.passages.open(session, *self.pair, messages=messages, max_bytes=self.settings.max_message_mb << 20)

    def _arrivals(self) -> dict[str, int]:
        return {site: self.runtime.desk.arrivals(site) for site in self.pair}
