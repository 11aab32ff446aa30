"""Bring a job's training script to its sites, and learn how many examples each of them registers."""

from __future__ import annotations

__all__ = ["Deployment"]

from collections.abc import Mapping, Sequence

from fedbio.errors import FederationError, ProtocolError, SettingsError
from fedbio.federation.controller import Controller
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import FLModel, Result
from fedbio.federation.open_task import is_own_reason
from fedbio.federation.workflows.counting import MAX_COUNT
from fedbio.federation.workflows.script import DEPLOY, END, EXAMPLES, ClientSpec, CodeFile
from fedbio.federation.workflows.streaming import stream_files
from fedbio.federation.workflows.study import meta
from fedbio.files import sha256_file
from fedbio.settings_jobs import CustomJob, ScriptJob

CODE = "code"
"""What a script is in the ledger of what the server sends."""

END_S = 60.0
"""Seconds that a job whose work is done waits for its scripts to end: a site gives them half of that."""


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
        # by the process that has taken the script, or said that it will not: the next one is given it again
        self._taken: dict[str, int] = {}
        self._declined: dict[str, int] = {}

    def sites(self) -> list[str]:
        """Return the sites that are here and have the script; those that have not answered yet are given it.

        A site that was away, or too late, or registered nonsense is given it with the next call; one that has refused
        or failed is when its next process has come.

        Raises
        ------
        FederationError
            If fewer sites than needed take it, with their reasons.
        """
        here = self.controller.sites()
        arrivals = {site: self.runtime.desk.arrivals(site) for site in here}
        having = [site for site in here if self._taken.get(site) == arrivals[site]]
        new = [site for site in here if site not in having and self._declined.get(site) != arrivals[site]]
        if new:
            self._deploy(new, arrivals, least=max(0, self.runtime.desk.needed(len(here)) - len(having)))
        return [site for site in here if self._taken.get(site) == arrivals[site] and self.examples.get(site)]

    def end(self) -> None:
        """Tell the scripts of the sites that are here that there is no more to do; one that has left needs no word."""
        here = [site for site in self.runtime.desk.sites(self.controller.job) if site in self.examples]
        deadline_s = min(END_S, self.runtime.limits.round_deadline_s)
        self.controller.broadcast_and_wait(
            END, FLModel(meta=meta(self.spec)), here, min_responses=0, deadline_s=deadline_s
        )

    def _deploy(self, sites: Sequence[str], arrivals: Mapping[str, int], *, least: int) -> None:
        files = [
            (self.paths[each.name], FileHeader(self.spec.group, each.name, each.sha256)) for each in self.spec.files
        ]
        missing = stream_files(self.controller, dict.fromkeys(sites, files), CODE)
        reached = [site for site in sites if site not in missing]
        if len(reached) < least:
            raise FederationError(
                f"job {self.controller.job}: {len(reached)} of {len(sites)} sites have got the script, {least} are "
                "needed; " + "; ".join(f"{site}: {reason}" for site, reason in missing.items())
            )
        model = FLModel(meta=meta(self.spec), total_rounds=self.spec.rounds)
        for result in self.controller.broadcast_and_wait(
            DEPLOY, model, reached, min_responses=least, check=_check_examples, missing=missing
        ):
            # what was registered first holds: a site cannot grow in the middle of a job
            self.examples.setdefault(result.site, result.model.meta[EXAMPLES])
            self._taken[result.site] = arrivals[result.site]
        self._declined |= {site: arrivals[site] for site, reason in missing.items() if is_own_reason(reason)}
        self.runtime.state.note(self.controller.job, EXAMPLES, self.examples)


def _check_examples(result: Result) -> None:
    count = result.model.meta.get(EXAMPLES)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_COUNT:
        raise ProtocolError(f"it registers {count!r:.100} examples; expected a number from 0 to {MAX_COUNT}")
