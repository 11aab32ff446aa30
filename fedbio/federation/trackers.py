"""Where the server puts metrics for people to look at: TensorBoard, MLflow, Weights & Biases, behind one interface.

Each module of theirs is imported when its tracker is opened, never before. None of them brings torch along.
"""

from __future__ import annotations

__all__ = ["MLflow", "TensorBoard", "Tracker", "WandB", "chosen", "open_tracker"]

import importlib.util
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fedbio.errors import SettingsError
from fedbio.files import write_whole

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

MLFLOW_BATCH = 1_000
"""The most metrics that MLflow takes in one request."""

MLFLOW_TAG_CHARACTERS = 5_000
"""The longest text of a tag that all of MLflow's stores take."""


def chosen(names: Sequence[TrackerName] | None) -> tuple[TrackerName, ...]:
    """Return the trackers to open: those named, or, of None, TensorBoard if it is installed.

    Raises
    ------
    SettingsError
        If one is named whose package is not installed.
    """
    if names is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"tracking: {name} is not installed on the server; `pip install 'fedbio[{name}]'`, or take it out of "
                "the list"
            )
    return tuple(names)


def open_tracker(name: TrackerName, workspace: Path, federation: str) -> Tracker:
    """Return one of the trackers for a federation's name; what it keeps on this machine goes into the workspace."""
    kinds: dict[TrackerName, Callable[[Path, str], Tracker]] = {
        "tensorboard": TensorBoard,
        "mlflow": MLflow,
        "wandb": WandB,
    }
    return kinds[name](workspace, federation)


class Tracker(ABC):
    """Takes what sites measure; used from one thread."""

    @abstractmethod
    def scalar(self, site: str, job: str, key: str, value: float, step: int) -> None:
        """Take one finite number."""

    @abstractmethod
    def text(self, site: str, job: str, key: str, value: str, step: int) -> None:
        """Take a text, such as the settings of a job."""

    @abstractmethod
    def flush(self) -> None:
        """Show what was taken; called when nothing more waits, several times a second at most."""

    @abstractmethod
    def close(self) -> None:
        """Write what there is and let go."""


class TensorBoard(Tracker):
    """Event files in ``tensorboard/JOB/SITE/``: ``tensorboard --logdir WORKSPACE/tensorboard``.

    Records are appended by file name: with a thousand sites, a thousand writers would keep as many files and threads.
    """

    def __init__(self, workspace: Path, federation: str) -> None:
        # TensorBoard's own record format and messages; its EventFileWriter would start a thread for each file
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._text_pb, self._writer = event_pb2, summary_pb2, text_pb, RecordWriter
        self._folder = workspace / "tensorboard"
        self._begun = set[Path]()
        self._waiting = defaultdict[Path, list[Any]](list)
        # a new name for each process: readers follow one file after the other
        self._name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"

    def scalar(self, site: str, job: str, key: str, value: float, step: int) -> None:
        summary = self._summary.Summary(value=[self._summary.Summary.Value(tag=key, simple_value=value)])
        self._add(site, job, summary, step)

    def text(self, site: str, job: str, key: str, value: str, step: int) -> None:
        self._add(site, job, self._text_pb(key, value), step)

    def _add(self, site: str, job: str, summary: Any, step: int) -> None:
        event = self._event.Event(wall_time=time.time(), step=step, summary=summary)
        self._waiting[self._folder / job / site / self._name].append(event)

    def flush(self) -> None:
        for path, events in self._waiting.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                writer = self._writer(file)
                if path not in self._begun:
                    self._begun.add(path)
                    begin = self._event.Event(wall_time=time.time(), file_version="brain.Event:2")
                    writer.write(begin.SerializeToString())
                for event in events:
                    writer.write(event.SerializeToString())
        self._waiting.clear()

    def close(self) -> None:
        self.flush()


class MLflow(Tracker):
    """One experiment for each job, ``FEDERATION/JOB``, with one run for each site.

    They go where ``MLFLOW_TRACKING_URI`` says, or else into ``mlflow.db`` in the workspace.
    """

    def __init__(self, workspace: Path, federation: str) -> None:
        import mlflow

        self._mlflow = mlflow
        self._federation = federation
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        # without a place of its own, an experiment's artifacts would go into the current folder
        self._artifacts = None if uri else (workspace / "mlflow").absolute().as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri or f"sqlite:///{(workspace / 'mlflow.db').absolute()}")
        self._runs: dict[tuple[str, str], str] = {}
        self._waiting = defaultdict[str, list[Any]](list)

    def scalar(self, site: str, job: str, key: str, value: float, step: int) -> None:
        metric = self._mlflow.entities.Metric(key, value, int(1000 * time.time()), step)
        self._waiting[self._run(site, job)].append(metric)

    def text(self, site: str, job: str, key: str, value: str, step: int) -> None:
        self._client.set_tag(self._run(site, job), key, value[:MLFLOW_TAG_CHARACTERS])

    def _run(self, site: str, job: str) -> str:
        """Return the id of a site's run, which a server that was started again goes on with."""
        if (site, job) not in self._runs:
            name = f"{self._federation}/{job}"
            experiment = self._client.get_experiment_by_name(name)
            there = experiment.experiment_id if experiment else self._client.create_experiment(name, self._artifacts)
            found = self._client.search_runs([there], f"attributes.run_name = '{site}'", max_results=1)
            if found and found[0].info.status == "RUNNING":
                self._runs[site, job] = found[0].info.run_id
            else:
                self._runs[site, job] = self._client.create_run(there, run_name=site).info.run_id
        return self._runs[site, job]

    def flush(self) -> None:
        for run, metrics in self._waiting.items():
            for first in range(0, len(metrics), MLFLOW_BATCH):
                self._client.log_batch(run, metrics=metrics[first : first + MLFLOW_BATCH])
        self._waiting.clear()

    def close(self) -> None:
        self.flush()
        for run in self._runs.values():
            self._client.set_terminated(run)


class WandB(Tracker):
    """One run for each site, in a group for each job, in a project with the federation's name.

    Without a key of Weights & Biases on this machine, or with ``WANDB_MODE=offline``, runs are kept in ``wandb/`` in
    the workspace, for ``wandb sync``.
    """

    def __init__(self, workspace: Path, federation: str) -> None:
        import wandb

        self._wandb = wandb
        self._workspace, self._federation = workspace, federation
        # it would ask on standard input for a key
        self._mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self._ids = workspace / "wandb.id"
        if not self._ids.exists():
            write_whole(self._ids, uuid.uuid4().hex[:16].encode())
        self._runs: dict[tuple[str, str], Any] = {}

    def scalar(self, site: str, job: str, key: str, value: float, step: int) -> None:
        # not its own step: rows behind the last one would be thrown away, and keys have steps of their own
        self._run(site, job).log({key: value, "step": step})

    def text(self, site: str, job: str, key: str, value: str, step: int) -> None:
        self._run(site, job).config.update({key: value}, allow_val_change=True)

    def _run(self, site: str, job: str) -> Any:
        if (site, job) not in self._runs:
            run = self._wandb.init(
                project=self._federation,
                group=job,
                name=site,
                id=f"{self._ids.read_text()}-{job}-{site}",
                resume="allow" if self._mode == "online" else None,
                dir=self._workspace,
                mode=self._mode,
                # several at once in one process
                reinit="create_new",
                settings=self._wandb.Settings(
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_git=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                ),
            )
            run.define_metric("*", step_metric="step")
            self._runs[site, job] = run
        return self._runs[site, job]

    def flush(self) -> None:
        """Nothing to do: its own process takes every row at once."""

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()
