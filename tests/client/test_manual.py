"""docs/client.md, coming-from.md and tracking.md: their programs run as they are printed, and their names are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import yaml

import fedbio.client as flare
from fedbio.federation import FLModel
from fedbio.settings import JobsFile
from fedbio.settings_jobs import FedAvgJob

from .at_hand import AtHand, here  # noqa: F401
from .conftest import ScriptSite
from .test_lightning import Line, quiet, trainer  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs"

NET = """
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

def load():
    return torch.eye(4)

def measure(net, data=None):
    return float(net.weight.detach().sum())

def train_one_epoch(net, data=None):
    with torch.no_grad():
        for each in net.parameters():
            each += 1
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def takes_part(site: ScriptSite, script: str, **settings: Any) -> None:
    """Have a script that adds 1 make the first model, train it twice with an evaluation after each, and end."""
    site.deploy(script, files={"net.py": NET}, initial="net.py:Net", **settings)
    first = site.initialize()
    assert {name: value.shape for name, value in first.params.items()} == {"weight": (2, 4), "bias": (2,)}
    params = first.params
    for number in range(2):
        answer = site.train(FLModel(params=params, current_round=number))
        assert answer.metrics == {"accuracy": pytest.approx(float(params["weight"].sum()), abs=1e-5)}
        assert np.array_equal(answer.params["weight"], params["weight"] + np.float32(1))
        params = answer.params
        measured = site.evaluate(FLModel(params=params, current_round=number))
        assert measured.metrics == {"accuracy": pytest.approx(float(params["weight"].sum()), abs=1e-5)}
    site.end()


def test_the_five_lines_take_part_in_the_job_beside_them(site: ScriptSite) -> None:
    script, _ = blocks("client.md", "python")
    (jobs,) = blocks("client.md", "yaml")
    (job,) = JobsFile.model_validate(yaml.safe_load(jobs)).jobs
    assert (job.client.script, job.client.files, job.client.initial) == ("train.py", ["net.py"], "net.py:Net")  # type: ignore[union-attr]
    takes_part(site, script)
    assert re.findall(r"# (\d)$", script, flags=re.MULTILINE) == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_the_decorated_functions_take_part(site: ScriptSite) -> None:
    _, script = blocks("client.md", "python")
    takes_part(site, script)


@pytest.mark.slow
def test_a_script_of_nvflare_takes_part_after_its_import_is_changed(site: ScriptSite) -> None:
    (diff,) = blocks("coming-from.md", "diff")
    after = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))
    takes_part(site, f"from net import Net, measure, train_one_epoch as train\n\nnet = Net()\n{after}")
    changed = [line for line in diff.splitlines() if line.startswith(("-", "+"))]
    assert changed == ["-import nvflare.client as flare", "+import fedbio.client as flare"]


def test_the_job_beside_those_of_nvflare_and_flower_is_the_same() -> None:
    recipe, program = blocks("coming-from.md", "python")[1:]
    (jobs,) = blocks("coming-from.md", "yaml")
    settings = JobsFile.model_validate(yaml.safe_load(jobs))
    (job,) = settings.jobs
    assert isinstance(job, FedAvgJob)
    assert (job.rounds, settings.federation.min_sites) == (5, 3)
    assert f'name="{job.name}"' in recipe
    assert f'train_script="{job.client.script}"' in recipe
    for other in (recipe, program):
        assert f"num_rounds={job.rounds}," in other or f"num_rounds={job.rounds})" in other
        assert "from net import Net" in other
    assert (job.client.files, job.client.initial) == (["net.py"], "net.py:Net")


def test_the_loop_of_a_trainer_runs(here: AtHand) -> None:  # noqa: F811
    (loop,) = blocks("tracking.md", "python")
    model = Line()
    here.ask("train", model.state_dict())
    here.end()

    class Module(lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            return model.data()

        val_dataloader = train_dataloader

    exec(loop, {"trainer": trainer(), "model": model, "data": Module()})  # the manual's own code
    (result,) = here.results
    assert set(result.model.metrics) == {"loss"}
    assert set(result.model.params) == set(model.state_dict())


def test_the_job_that_names_trackers_is_valid() -> None:
    (jobs,) = blocks("tracking.md", "yaml")
    assert JobsFile.model_validate(yaml.safe_load(jobs)).tracking == ["tensorboard", "mlflow"]


def test_every_function_in_the_table_of_the_client_is_there_and_the_other_way_round() -> None:
    told = set(re.findall(r"`(?:flare\.)?(\w+)[(`]", (DOCS / "client.md").read_text()))
    told |= set(re.findall(r"`flare\.(\w+)`", (DOCS / "client.md").read_text()))
    assert set(flare.__all__) - {"ParamsType"} <= told
    assert all(hasattr(flare, name) for name in re.findall(r"`flare\.(\w+)", (DOCS / "client.md").read_text()))
