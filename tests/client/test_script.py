"""A site and its training script: real processes and sockets, and what happens when the script does wrong."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.federation import FLModel

from .conftest import LOOP, ScriptSite

ADD_ONE = (
    LOOP
    + """
    params = {name: value + 1 for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, metrics={"loss": 0.5}))
"""
)


@pytest.mark.parametrize("launch", ["process", "in_process"])
def test_script_trains_round_after_round_and_ends(site: ScriptSite, launch: str) -> None:
    site.deploy(ADD_ONE, launch=launch)
    model = FLModel(params={"layers.0": np.arange(6, dtype=np.float32).reshape(2, 3)})
    for number in range(3):
        answer = site.train(FLModel(params=model.params, current_round=number, total_rounds=3))
        np.testing.assert_array_equal(answer.params["layers.0"], model.params["layers.0"] + 1)
        assert answer.metrics == {"loss": 0.5}
        assert answer.meta == {"weight": 30}
        assert answer.current_round == number
        model = answer
    assert site.evaluate(model).metrics == {"loss": 0.5}
    assert site.evaluate(model).params == {}
    site.end()
