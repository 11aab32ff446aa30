"""Several ranks of one script, of which only the first answers: all of them go on to the next model together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fedbio.client as flare
from fedbio.client.link import QueueLink
from fedbio.client.session import Session
from fedbio.federation import FLModel, Task
from fedbio.federation.model import Result

from .conftest import ScriptSite

WAIT_S = 20


class Together:
    """Two ranks on two threads; a call that only one of them makes, or another one, breaks the barrier."""

    def __init__(self) -> None:
        self._all = threading.Barrier(2, timeout=WAIT_S)
        self._said: dict[int, tuple[str, Any]] = {}
        self._rank = threading.local()

    def on(self, rank: int) -> None:
        self._rank.number = rank

    def _exchange(self, what: str, value: Any) -> Any:
        self._said[self._rank.number] = (what, value)
        self._all.wait()
        (first, found), (second, _) = self._said[0], self._said[1]
        self._all.wait()
        assert first == second
        return found

    def agree(self, value: bool) -> bool:
        return bool(self._exchange("agree", value))

    def share(self, task: Task | None, waits: bool) -> tuple[Task | None, bool]:
        found: tuple[Task | None, bool] = self._exchange("share", (task, waits))
        return found


def run(script: Callable[[Session], list[int]], rounds: int = 3) -> tuple[list[list[int]], list[Result]]:
    """Run a script on two ranks; return what each of them returns, and the answers."""
    together, answers = Together(), list[Result]()
    link = QueueLink({}, lambda task: None, answers.append, lambda metric: None)
    for number in range(rounds):
        link.put(Task(name="client/train", model=FLModel(params={"w": np.zeros(1)}, current_round=number)))
    link.put(None)
    sessions = [Session(link, {}, 0, ranks=together), Session(None, {}, 1, ranks=together)]

    def rank(number: int) -> list[int]:
        together.on(number)
        return script(sessions[number])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, (0, 1))), answers


def answer(session: Session) -> None:
    session.send(flare.FLModel(metrics={"loss": 1}), clear=True)


@pytest.mark.parametrize("receiving", ["all", "first", "none"])
@pytest.mark.parametrize("sending", ["all", "first"])
def test_a_loop_that_asks_whether_it_runs_works_on_the_same_model_on_all_ranks(receiving: str, sending: str) -> None:
    def script(session: Session) -> list[int]:
        rounds = []
        while session.is_running():
            assert session.is_running()
            assert session._model is not None
            rounds.append(session._model.current_round or 0)
            assert len(rounds) <= 3
            if receiving == "all" or (receiving == "first" and session.rank == 0):
                assert session.receive(None) is session._model
            if sending == "all" or session.rank == 0:
                answer(session)
        return rounds

    found, answers = run(script)
    assert found == [[0, 1, 2], [0, 1, 2]]
    assert len(answers) == 3


def test_a_loop_that_only_receives_works_on_the_same_model_on_all_ranks() -> None:
    def script(session: Session) -> list[int]:
        rounds = []
        while (model := session.receive(None)) is not None:
            assert session.receive(None) is model
            rounds.append(model.current_round or 0)
            assert len(rounds) <= 3
            if session.rank == 0:
                answer(session)
        return rounds

    assert run(script)[0] == [[0, 1, 2], [0, 1, 2]]


def test_an_answer_that_only_another_rank_has_sent_is_told() -> None:
    def script(session: Session) -> list[int]:
        assert session.is_running()
        if session.rank == 1:
            answer(session)
            with pytest.raises(RuntimeError, match=r"call send\(\) on rank 0 or on all ranks"):
                session.is_running()
        else:
            assert session.is_running()
        return []

    assert run(script, 1) == ([[], []], [])


FIRST_SENDS = """
import torch, torch.distributed as dist
import fedbio.client as flare

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    flare.init(rank=f"{rank}")
    while flare.is_running():
        model = flare.receive()
        mine = model.params["w"] * (rank + 1)
        dist.all_reduce(mine)
        print(f"rank {rank} in round {model.current_round}", flush=True)
        if rank == 0:
            flare.send(flare.FLModel(params={"w": mine}))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_of_torchrun_stay_together_when_only_the_first_sends(site: ScriptSite) -> None:
    site.deploy(FIRST_SENDS, launch="torchrun", processes=2, idle_s=120)
    model = FLModel(params={"w": np.ones(4, np.float32)})
    for number in range(3):
        model = site.train(FLModel(params=model.params, current_round=number))
        assert model.params["w"].tolist() == [3.0 ** (number + 1)] * 4
    site.end()
    for rank in (0, 1):
        assert [f"rank {rank} in round {number}" in site.log for number in range(3)] == [True] * 3
