"""Bring a job's training script to its sites, and learn how many examples each of them registers."""

from __future__ import annotations

__all__ = ["Deployment"]

import time
from collections.abc import Sequence

from fedbio.errors import FederationError, SettingsError, TransportError
from fedbio.federation.controller import Controller
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import FLModel
from fedbio.federation.workflows.script import DEPLOY, END, EXAMPLES, ClientSpec, CodeFile
from fedbio.federation.workflows.study import meta
from fedbio.files import sha256_file
from fedbio.settings_jobs import CustomJob, ScriptJob

CODE = "code"
"""What a script is in the ledger of what the server sends."""

RETRY_S = 1.0
"""Seconds between two attempts to stream a file to a site whose connection broke."""


class Deployment:
    """A job's script at its sites.

    Parameters
    ----------
    controller : Controller
        Of the job.
    job : ScriptJob or CustomJob
        With a script.
    rounds : int
        How often the script will be asked to train.

    Attributes
    ----------
    examples : dict of str to int
        How many examples each site has registered, once and for the whole job: the most weight that it may claim.
    """

    def __init__(self, controller: Controller, job: ScriptJob | CustomJob, rounds: int) -> None:
        self.controller, self.runtime = controller, controller.runtime
        client = job.client
        assert client is not None
        self.paths = {name: self.runtime.code / name for name in (client.script, *client.files)}
        if missing := sorted(str(path) for path in self.paths.values() if not path.is_file()):
            raise SettingsError(f"job {controller.job}: {', '.join(missing)}: not found; put it beside the job file")
        self.spec = ClientSpec(
            workflow=job.workflow,
            files=tuple(CodeFile(name, sha256_file(path), path.stat().st_size) for name, path in self.paths.items()),
            script=client.script,
            launch=client.launch,
            processes=client.processes,
            arguments=tuple(client.arguments),
            initial=client.initial,
            idle_s=client.idle_s,
            rounds=rounds,
        )
        self.examples: dict[str, int] = self.runtime.state.noted(controller.job, EXAMPLES, dict[str, int]) or {}
        self._arrivals: dict[str, int] = {}

    def sites(self) -> list[str]:
        """Return the sites that are here and have the script; those that came since the last call are given it.

        Raises
        ------
        FederationError
            If fewer sites than needed take it, with their reasons.
        """
        here = self.controller.sites()
        arrivals = {site: self.runtime.desk.arrivals(site) for site in here}
        new = [site for site in here if self._arrivals.get(site) != arrivals[site]]
        if new:
            self._deploy(new, least=max(0, self.runtime.desk.needed(len(here)) - (len(here) - len(new))))
            self._arrivals |= {site: arrivals[site] for site in new}
        return [site for site in here if self.examples.get(site)]

    def end(self) -> None:
        """Tell the scripts that there is no more to do."""
        here = [site for site in self.controller.sites() if site in self.examples]
        self.controller.broadcast_and_wait(END, FLModel(meta=meta(self.spec)), here, min_responses=0)

    def _deploy(self, sites: Sequence[str], *, least: int) -> None:
        reached = [site for site in sites if self._stream_to(site)]
        model = FLModel(meta=meta(self.spec), total_rounds=self.spec.rounds)
        for result in self.controller.broadcast_and_wait(
            DEPLOY, model, reached, min_responses=min(least, len(reached))
        ):
            count = result.model.meta.get(EXAMPLES)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise FederationError(f"{result.site} registers {count!r} examples; expected a number")
            # what was registered first holds: a site cannot grow in the middle of a job
            self.examples.setdefault(result.site, count)
        self.runtime.state.note(self.controller.job, EXAMPLES, self.examples)

    def _stream_to(self, site: str) -> bool:
        """Send a site the files; return False if it did not take them until the round's deadline."""
        deadline = time.monotonic() + self.runtime.limits.round_deadline_s
        for each in self.spec.files:
            while True:
                try:
                    self.runtime.send_file(
                        site, self.paths[each.name], FileHeader(self.spec.group, each.name, each.sha256), CODE
                    )
                    break
                except TransportError as error:
                    if time.monotonic() > deadline:
                        self.runtime.events.write("code not sent", site=site, file=each.name, reason=str(error))
                        return False
                    time.sleep(RETRY_S)
        return True
