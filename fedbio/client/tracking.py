"""Writers of metrics with the interfaces of TensorBoard, MLflow and Weights & Biases; all go to the server.

A script changes the import: ``from fedbio.client.tracking import SummaryWriter``. What numbers the server shows, and
where, is the job file's `tracking`; names and meanings are those of NVIDIA FLARE's writers. Texts stay at the site, in
its log: only numbers leave it.
"""

from __future__ import annotations

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]

from collections.abc import Mapping
from typing import Any, Self

from fedbio.client.api import log


class SummaryWriter:
    """TensorBoard's writer.

    Parameters
    ----------
    *_, **__
        Where files would go, as TensorBoard's writer takes it; of no use here.

    Examples
    --------
    >>> writer = SummaryWriter()
    >>> writer.add_scalar("train/loss", 0.5, global_step=3)  # doctest: +SKIP
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **_: Any) -> None:
        """Send one number."""
        log(tag, scalar, "SCALAR", global_step=global_step)

    def add_scalars(self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **_: Any) -> None:
        """Send numbers that belong together, as ``tag/NAME``."""
        log(tag, dict(scalars), "SCALARS", global_step=global_step)

    def flush(self) -> None:
        """Nothing to do: numbers are on their way at once."""

    def close(self) -> None:
        """Nothing to do: there is no file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MLflowWriter:
    """The functions of ``mlflow`` that log to a run."""

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Send one number."""
        log(key, value, "METRIC", global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send several numbers."""
        for key, value in metrics.items():
            self.log_metric(key, value, step)

    def log_param(self, key: str, value: Any) -> None:
        """Keep a setting of the script in the site's log."""
        log(key, str(value), "PARAMETER")

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Keep settings of the script in the site's log."""
        for key, value in values.items():
            self.log_param(key, value)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Keep a text in the site's log."""
        log(artifact_file_path, text, "TEXT")

    def set_tag(self, key: str, tag: Any) -> None:
        """Keep a tag in the site's log."""
        log(key, str(tag), "TAG")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Keep tags in the site's log."""
        for key, tag in tags.items():
            self.set_tag(key, tag)


class WandBWriter:
    """``wandb.log``."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send several numbers."""
        for key, value in metrics.items():
            log(key, value, "METRIC", global_step=step)
