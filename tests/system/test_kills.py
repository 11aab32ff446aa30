"""Real processes, killed without warning: the others go on, the killed one goes on when it is started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from fedbio.files import sha256_file

pytestmark = pytest.mark.faults

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 40


def finish(parties: Any, *processes: Any) -> None:
    for process in processes:
        assert process.wait(90) == 0, "\n".join(f"== {name}\n{parties.log(name)}" for name in ("server", *SITES))


def digest(folder: Path) -> str:
    return sha256_file(folder / "global" / "model.safetensors")


def test_killed_server_and_killed_site_end_with_the_model_of_an_unbroken_run(parties: Any, tmp_path: Path) -> None:
    parties.write_jobs(rounds=ROUNDS)
    finish(parties, parties.server(), *map(parties.site, SITES))
    unbroken = digest(parties.folder / "server")
    for name in ("server", *SITES):
        (parties.folder / name).rename(tmp_path / f"unbroken-{name}")
        (parties.folder / f"{name}.log").unlink()
    for site in SITES:
        (parties.folder / site).mkdir()
        (tmp_path / f"unbroken-{site}" / "embeddings.h5").rename(parties.folder / site / "embeddings.h5")

    server, *sites = parties.server(), *map(parties.site, SITES)
    parties.wait_for_round(1, 10)
    server.kill()
    server.wait()
    server = parties.server()
    parties.wait_for_round(1, 25)
    sites[1].kill()
    sites[1].wait()
    sites[1] = parties.site("site-2")
    finish(parties, server, *sites)

    assert digest(parties.folder / "server") == unbroken
    assert {digest(parties.folder / site) for site in SITES} == {unbroken}
    # what was finished before the kill was not done again
    assert parties.rounds().count((0, 30)) == 1
    # the ledger of a killed site counts what left before the kill
    record = json.loads((parties.folder / "site-2" / "party.json").read_text())
    before = json.loads((tmp_path / "unbroken-site-2" / "party.json").read_text())
    assert record["sent"]["model"]["messages"] >= before["sent"]["model"]["messages"]


def test_round_goes_on_without_a_killed_site_if_enough_are_left(parties: Any) -> None:
    parties.write_jobs(rounds=60, min_sites=2, round_deadline_s=10)
    server, *sites = parties.server(), *map(parties.site, SITES)
    parties.wait_for_round(0, 5)
    sites[2].send_signal(signal.SIGKILL)
    finish(parties, server, *sites[:2])
    assert "site lost peer=site-3" in parties.log("server")
    assert (parties.folder / "site-1" / "global" / "model.json").exists()


def test_killed_site_is_named_if_all_are_needed(parties: Any) -> None:
    parties.write_jobs(rounds=ROUNDS, round_deadline_s=10)
    server, *sites = parties.server(), *map(parties.site, SITES)
    parties.wait_for_round(0, 5)
    sites[2].send_signal(signal.SIGKILL)
    assert server.wait(60) == 3
    assert "2 of 3 sites" in parties.log("server")
    assert "site-3" in parties.log("server").splitlines()[-1]
    for site in sites[:2]:
        assert site.wait(30) == 3
    assert "the server has given up: job classify" in parties.log("site-1").splitlines()[-1]


def test_interrupted_parties_end_within_ten_seconds_and_go_on_later(parties: Any) -> None:
    parties.write_jobs(rounds=ROUNDS)
    server, *sites = parties.server(), *map(parties.site, SITES)
    parties.wait_for_round(0, 5)
    for process in (server, *sites):
        process.send_signal(signal.SIGTERM)
    for process in (server, *sites):
        assert process.wait(10) == 130
    finish(parties, parties.server(), *map(parties.site, SITES))
