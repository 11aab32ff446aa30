"""Scripts that are started when their files are there, before there is a task for them."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.errors import FederationError
from fedbio.federation import FLModel

from .conftest import ScriptSite, wait_until

SCRIPT = """
import os, random
import numpy as np
import fedbio.client as flare

def net():
    print("made by", os.getpid(), flush=True)
    random.random()
    return {"w": np.zeros(2, np.float32)}

if __name__ == "__main__":
    random.seed(1)
    print("begun by", os.getpid(), flush=True)
    flare.init()
    while flare.is_running():
        model = flare.receive()
        print("trained by", os.getpid(), flush=True)
        flare.send(flare.FLModel(params={"w": model.params["w"] + np.float32(random.random())}))
"""


def test_a_script_that_waits_for_its_first_task_makes_the_initial_model_and_then_trains_it(site: ScriptSite) -> None:
    site.context.ahead = True
    site.deploy(SCRIPT, initial="train.py:net")
    wait_until(lambda: "begun" in site.log)
    first = site.initialize()
    assert first.params["w"].tolist() == [0, 0]
    trained = site.train(FLModel(params=first.params))
    # what the model drew is not missing
    assert trained.params["w"].tolist() == pytest.approx([0.13436424411240122] * 2)
    site.end()
    lines = [line.rpartition(" by ") for line in site.log.splitlines()]
    assert [said for said, _, _ in lines] == ["begun", "made", "trained"]
    assert len({process for _, _, process in lines}) == 1


def test_a_function_that_is_not_there_ends_a_script_that_waits_with_one_line(
    site: ScriptSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.context.ahead = True
    site.deploy(SCRIPT, initial="train.py:nett")
    wait_until(lambda: "begun" in site.log)
    with pytest.raises(FederationError, match=r": client\.initial: train\.py has no function nett; it has net"):
        site.initialize()
    assert "Traceback" not in site.log + caplog.text


@pytest.mark.parametrize("script", ["raise ValueError('no data here')", "import sys; sys.exit(0)"])
def test_a_script_that_ends_before_its_first_task_fails_with_it(site: ScriptSite, script: str) -> None:
    site.context.ahead = True
    site.deploy(script)
    reason = "ValueError: no data here" if "raise" in script else "ended without having asked for a model"
    with pytest.raises(FederationError, match=reason):
        site.train(FLModel(params={"w": np.zeros(2, np.float32)}))


def test_a_site_that_ends_takes_a_script_along_that_had_no_task(site: ScriptSite) -> None:
    site.context.ahead = True
    site.deploy(SCRIPT)
    wait_until(lambda: "begun" in site.log)
    site.end()
    assert "trained" not in site.log
