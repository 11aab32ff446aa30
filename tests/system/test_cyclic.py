"""Cyclic weight transfer by the commands that people type: processes, gRPC with mutual TLS, real scripts, and kills."""

from __future__ import annotations

import json
import textwrap
import time
from typing import Any

import numpy as np
import pytest
import yaml

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


def start_site(parties: Parties, site: str) -> Any:
    return parties.site(site, "--code", str(parties.folder / "train.py"))


def wait_for_step(parties: Parties, step: int) -> None:
    path, deadline = parties.folder / "server" / "events.jsonl", time.monotonic() + 90
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        if any(each["event"] == "model saved" and each["step"] >= step for each in found):
            return
        assert time.monotonic() < deadline, parties.log("server") + parties.log("site-1")
        time.sleep(0.02)


def expected() -> np.ndarray[Any, Any]:
    model = np.ones(WIDTH, np.float32)
    for number in range(ROUNDS):
        for place in (1, 2, 3):
            noise = np.random.default_rng([place, number]).random(WIDTH, np.float32)
            model = model * np.float32(0.9) + noise
    return model


def test_server_and_a_site_are_killed_and_the_model_is_that_of_a_plain_loop(parties: Parties) -> None:
    (parties.folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    job = {"workflow": "cyclic", "rounds": ROUNDS, "client": {"script": "train.py", "initial": "train.py:first"}}
    limits = {"heartbeat_s": 2, "join_deadline_s": 60, "round_deadline_s": 60}
    (parties.folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job], "federation": limits}))
    processes = [parties.server(), *(start_site(parties, site) for site in SITES)]
    for victim, step in ((0, 2), (2, 4), (0, 6), (1, 8)):
        wait_for_step(parties, step)
        processes[victim].kill()
        processes[victim].wait()
        processes[victim] = parties.server() if victim == 0 else start_site(parties, SITES[victim - 1])
    for process in processes:
        assert process.wait(120) == 0, "\n".join(f"== {name}\n{parties.log(name)}" for name in ("server", *SITES))
    folder = parties.folder / "server" / "models" / "cyclic"
    np.testing.assert_array_equal(open_file(folder / "last.safetensors")["w"], expected())
