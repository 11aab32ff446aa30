"""What a training script imports to take part in a federation: ``import fedbio.client as flare``."""

from __future__ import annotations

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

from fedbio.client.analytics import AnalyticsDataType
from fedbio.client.api import (
    evaluate,
    get_config,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
    train,
)
from fedbio.client.model import FLModel, ParamsType
