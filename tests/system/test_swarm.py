"""Swarm learning by the commands that people type: processes, gRPC with mutual TLS, scripts of their own, and kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.files import sha256_file
from fedbio.tensors import open_file

from .conftest import SITES, Parties

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ROUNDS = 8
WIDTH = 700_000
"""Numbers in the model: its 2.8 MB are sealed in three chunks."""

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
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={{"accuracy": 0.0}}))
            continue
        time.sleep(0.2)
        noise = np.random.default_rng([place, model.current_round]).random({WIDTH}, np.float32)
        params = {{"w": model.params["w"] * np.float32(0.9) + noise}}
        flare.send(flare.FLModel(params=params, metrics={{"accuracy": float(model.current_round == 3)}}))


if __name__ == "__main__":
    main()
"""


def start_all(parties: Parties) -> list[Any]:
    parties.write_script_job(SCRIPT, workflow="swarm", rounds=ROUNDS)
    return [parties.server(), *(parties.script_site(site) for site in SITES)]


def finish(parties: Parties, processes: list[Any]) -> set[tuple[str, str]]:
    """Return the digests of best and last model at all sites."""
    for process in processes:
        assert process.wait(120) == 0, "\n".join(f"== {name}\n{parties.log(name)}" for name in ("server", *SITES))
    folders = [parties.folder / site / "swarm" / "swarm" for site in SITES]
    return {tuple(sha256_file(each / f"{name}.safetensors") for name in ("best", "last")) for each in folders}  # type: ignore[misc]


def expected() -> np.ndarray[Any, Any]:
    model = np.ones(WIDTH, np.float32)
    for number in range(ROUNDS):
        noises = [np.random.default_rng([place, number]).random(WIDTH, np.float32) for place in (1, 2, 3)]
        models = [model * np.float32(0.9) + noise for noise in noises]
        # 60 proteins at each site
        model = np.mean(np.stack(models).astype(np.float64), axis=0).astype(np.float32)
    return model


def test_swarm_whose_server_and_a_site_are_killed_ends_with_the_model_of_an_unbroken_run(
    parties: Parties, tmp_path: Path
) -> None:
    [unbroken] = finish(parties, start_all(parties))
    np.testing.assert_allclose(open_file(parties.folder / "site-1/swarm/swarm/last.safetensors")["w"], expected(), 1e-5)
    card = json.loads((parties.folder / "site-2/swarm/swarm/model.json").read_text())
    assert (card["best"]["round"], card["last"]["round"]) == (3, ROUNDS)
    for name in ("server", *SITES):
        (parties.folder / name).rename(tmp_path / f"unbroken-{name}")
    for site in SITES:
        (parties.folder / site).mkdir()

    processes = start_all(parties)
    parties.wait_for_event("round", "round", 2)
    processes[0].kill()
    processes[0].wait()
    processes[0] = parties.server()
    parties.wait_for_event("round", "round", 4)
    processes[2].kill()
    processes[2].wait()
    processes[2] = parties.script_site("site-2")
    assert finish(parties, processes) == {unbroken}
