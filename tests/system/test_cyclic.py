"""Cyclic weight transfer by the commands that people type: processes, gRPC with mutual TLS, real scripts, and kills."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedbio.tensors import open_file

from .conftest import SITES, Parties

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ROUNDS = 4
WIDTH = 500_000
"""Numbers in the model: its 2 MB travel in several chunks."""

SCRIPT = f"""
import time

import numpy as np
import fedbio.client as flare


def first():
    return {{"w": np.ones({WIDTH}, np.float32)}}


def main():
    flare.init()
    place = int(flare.get_site_name()[-1])
    while flare.is_running():
        model = flare.receive()
        time.sleep(0.3)
        noise = np.random.default_rng([place, model.current_round]).random({WIDTH}, np.float32)
        flare.send(flare.FLModel(params={{"w": model.params["w"] * np.float32(0.9) + noise}}))


if __name__ == "__main__":
    main()
"""


def expected() -> np.ndarray[Any, Any]:
    model = np.ones(WIDTH, np.float32)
    for number in range(ROUNDS):
        for place in (1, 2, 3):
            noise = np.random.default_rng([place, number]).random(WIDTH, np.float32)
            model = model * np.float32(0.9) + noise
    return model


def test_server_and_a_site_are_killed_and_the_model_is_that_of_a_plain_loop(parties: Parties) -> None:
    parties.write_script_job(SCRIPT, workflow="cyclic", rounds=ROUNDS)
    processes = [parties.server(), *(parties.script_site(site) for site in SITES)]
    for victim, step in ((0, 2), (2, 4), (0, 6), (1, 8)):
        parties.wait_for_event("model saved", "step", step)
        processes[victim].kill()
        processes[victim].wait()
        processes[victim] = parties.server() if victim == 0 else parties.script_site(SITES[victim - 1])
    for process in processes:
        assert process.wait(120) == 0, "\n".join(f"== {name}\n{parties.log(name)}" for name in ("server", *SITES))
    folder = parties.folder / "server" / "models" / "cyclic"
    np.testing.assert_array_equal(open_file(folder / "last.safetensors")["w"], expected())
