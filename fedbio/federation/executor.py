"""The interface of what a site does when it is handed a task."""

from __future__ import annotations

__all__ = ["Executor", "SiteContext"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fedbio.federation.filters import Chain
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.model import FLModel, Task
from fedbio.federation.policy import Policy
from fedbio.federation.split_site import SplitSite
from fedbio.results import EventLog, PartyRecord


@dataclass(slots=True, kw_only=True)
class SiteContext:
    """Where a site's own things are, and the record that it keeps of the run.

    Parameters
    ----------
    site : str
        The name in the site's certificate.
    workspace : Path
        The folder for everything that the site keeps.
    data : Path
        The site's own proteins.
    labels : Path or None
        A table with their labels.
    reuse : Path or None
        An embeddings file to take vectors from.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    threads : int or None
        Threads for computing; None leaves the choice to the library.
    synthetic : bool
        Whether the proteins come from the demo generator.
    policy : Policy
        What the site's operator lets the server's jobs do; a script runs only if it allows its files.
    examples : int or None
        How many examples the site registers for a job of a script; None counts its proteins.
    identity : SiteIdentity or None
        With which it signs what it says to other sites; None if it has no certificate.
    outgoing : Chain
        The site's filters, for what an executor closes so that nobody can filter it afterwards.
    split : SplitSite or None
        The way to another site, for what trains one part of a network.
    job : str
        The job of the task that is being done, or was done last.
    ahead : bool
        Whether a script may be started before it has its first task: the site has a process, and thus memory, of
        its own.
    on_metric : callable or None
        Takes job, key, value and step of a number that shall be seen at the server at once.
    """

    site: str
    workspace: Path
    data: Path
    record: PartyRecord
    events: EventLog
    labels: Path | None = None
    reuse: Path | None = None
    device: str = "auto"
    threads: int | None = None
    synthetic: bool = False
    policy: Policy = field(default_factory=Policy)
    examples: int | None = None
    identity: SiteIdentity | None = None
    outgoing: Chain = field(default_factory=Chain)
    split: SplitSite | None = None
    job: str = ""
    ahead: bool = False
    on_metric: Callable[[str, str, float, int | None], None] | None = None

    @property
    def embeddings(self) -> Path:
        """The site's own embeddings file."""
        return self.workspace / "embeddings.h5"

    def received(self, group: str) -> Path:
        """Return the folder of files from the server that belong together, known by their common digest."""
        return self.workspace / "received" / group

    def track(self, key: str, value: float, step: int | None = None, *, job: str | None = None) -> None:
        """Show a number at the server while the task is still done; from any thread, and without waiting for it.

        Parameters
        ----------
        key : str
            What it is: names joined by slashes, up to 200 characters.
        value : float
            One that is not finite is not sent.
        step : int, optional
            Where it stands on the curve's axis; 0 by default.
        job : str, optional
            Whose it is; by default that of the task.
        """
        if self.on_metric is not None:
            self.on_metric(self.job if job is None else job, key, value, step)

    def remark(self, sentence: str) -> None:
        """Put a sentence into the record once; readers of the report will see it."""
        if sentence not in self.record.remarks:
            self.record.remarks.append(sentence)
            self.events.write("remark", remark=sentence)


class Executor(ABC):
    """Does one task at a site.

    Attributes
    ----------
    name : str
        The task's name.
    kind : str
        What the site's policy calls it; see ``allow`` in the site's settings.
    leaves : str
        What its answer is in the ledger of what left the site: ``"counts"``, ``"model"``, ...; if the answer carries
        tensors these are meant, and the few numbers beside them count as ``"metrics"``.
    stage : str
        Where its seconds go in the site's record; by default its kind.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    leaves: ClassVar[str]
    stage: ClassVar[str] = ""

    @property
    def at_rest(self) -> bool:
        """Whether a new one could do the site's next task as well: all that this one keeps can be had again."""
        return True

    def abandon(self, job: str) -> None:  # noqa: B027 - most executors have nothing that runs on its own
        """Stop what is done for a job, if it can be stopped: the job was aborted, or has failed elsewhere.

        Called on another thread, also while `execute` runs; what that returns then is thrown away.
        """

    def close(self) -> None:  # noqa: B027 - as above
        """Stop what runs on its own: the site ends. Called on any thread, also while `execute` runs, and twice."""

    @abstractmethod
    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Do the task and return what shall go to the server, and nothing more.

        A `FedbioError` ends the task, not the site: the server is told its message.
        """
