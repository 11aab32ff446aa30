"""The names of NVIDIA FLARE's Client API are here, and take what its functions take."""

from __future__ import annotations

import inspect
from types import ModuleType

import numpy as np
import pytest

import fedbio.client
import fedbio.client.hf
import fedbio.client.huggingface
import fedbio.client.lightning

from .at_hand import AtHand, here  # noqa: F401

# what nvflare/client/__init__.py, client/hf/__init__.py and client/lightning/__init__.py of 2.9 import or list, but for
# IPCAgent, the end of a pipe that this package has not
CLIENT = """AnalyticsDataType FLModel ParamsType evaluate get_config get_job_id get_site_name get_task_name init
    is_evaluate is_running is_submit_model is_train log receive send shutdown system_info train"""
LIGHTNING = """AnalyticsDataType FLModel ParamsType FLCallback patch logger get_config get_job_id get_site_name init
    is_running log receive shutdown system_info"""


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (fedbio.client, CLIENT),
        (fedbio.client.hf, f"{CLIENT} patch"),
        (fedbio.client.huggingface, f"{CLIENT} patch"),
        (fedbio.client.lightning, f"{CLIENT} {LIGHTNING}"),
    ],
)
def test_module_has_the_names_of_nvflares(module: ModuleType, names: str) -> None:
    assert set(names.split()) <= set(module.__all__)
    for name in CLIENT.split():
        assert getattr(module, name) is getattr(fedbio.client, name)
    assert all(hasattr(module, name) for name in module.__all__)


def test_both_names_of_the_module_for_hugging_face_mean_the_same() -> None:
    assert fedbio.client.hf.__all__ == fedbio.client.huggingface.__all__
    assert fedbio.client.hf.patch is fedbio.client.huggingface.patch


def test_file_and_context_of_nvflare_are_taken_and_not_looked_at(here: AtHand) -> None:  # noqa: F811
    flare, context = fedbio.client, object()
    here.ask("train", {})
    here.end()
    flare.init(rank="0", config_file="config/there_is_none.json")
    assert flare.is_running(ctx=context)
    assert flare.receive(5.0, context) is flare.receive(ctx=context)
    assert flare.get_task_name(ctx=context) == "train"
    flare.log("loss", 0.5, flare.AnalyticsDataType.SCALAR, context, global_step=3)
    flare.send(flare.FLModel(params={"w": np.ones(1)}), True, context)
    assert not flare.is_running(context)
    flare.shutdown(ctx=context)
    assert [(each.key, each.value, each.step) for each in here.metrics] == [("loss", 0.5, 3)]
    of_nvflare = "receive send system_info get_config get_job_id get_site_name get_task_name is_running is_train"
    for name in f"{of_nvflare} is_evaluate is_submit_model log shutdown".split():
        assert "ctx" in inspect.signature(getattr(flare, name)).parameters
