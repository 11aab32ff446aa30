"""A site's answers: given again to whom they are due, and to nobody else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedbio.federation import FLModel, Result, Task
from fedbio.federation.answers import Answer, Answers, Heard, content_of
from fedbio.federation.held import Held
from fedbio.federation.model import Delivery, Status, decode

DIGEST = b"\1" * 32


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(Held(tmp_path))


def task(name: str = "train", number: int = 3, **more: object) -> Task:
    return Task(name=name, job="job", model=FLModel(current_round=number), **more)  # type: ignore[arg-type]


def heard(task: Task, arrival: int, digest: bytes = DIGEST) -> Heard:
    return Heard(content_of(task, digest=digest, has_payload=True), arrival)


def make(answers: Answers, task: Task, arrival: int, **result: object) -> Answer:
    model = FLModel(params={"w": np.ones(3, np.float32)} if task.name == "train" else {}, meta={"weight": 2})
    made = Result(task=task.id, model=model, **result)  # type: ignore[arg-type]
    return answers.make(task, made, heard(task, arrival), leaves="model")


def test_same_id_gets_the_same_answer(answers: Answers) -> None:
    asked = task()
    made = make(answers, asked, 1)
    assert answers.kept(asked, heard(asked, 1)) is made


def test_next_process_of_the_server_gets_the_same_answer_under_its_own_id(answers: Answers) -> None:
    asked, again = task(), task()
    made = make(answers, asked, 1)
    given = answers.kept(again, heard(again, 2))
    assert given is not None
    assert given.payload is made.payload
    assert (given.task, given.kind, given.topic) == (again.id, made.kind, made.topic)
    result = decode(Result, given.body, {})
    assert (result.task, result.model.meta) == (again.id, {"weight": 2})
    # it is the answer to that from now on, also for the process after the next
    third = task()
    assert answers.kept(third, heard(third, 3)) is not None


def test_process_that_asks_twice_has_it_done_twice(answers: Answers) -> None:
    asked, again = task(), task()
    make(answers, asked, 1)
    assert answers.kept(again, heard(again, 1)) is None


@pytest.mark.parametrize(
    "other", [task(number=4), task("evaluate"), msgspec.structs.replace(task(), job="other"), task(rounds=9)]
)
def test_another_task_is_done(answers: Answers, other: Task) -> None:
    make(answers, task(), 1)
    assert answers.kept(other, heard(other, 2)) is None


def test_another_model_is_trained(answers: Answers) -> None:
    again = task()
    make(answers, task(), 1)
    assert answers.kept(again, heard(again, 2, b"\2" * 32)) is None


def test_what_cannot_be_told_apart_is_done_again(answers: Answers) -> None:
    long = Task(name="train", model=FLModel(meta={"table": "x" * (1 << 20)}))
    lockstep = task(delivery=Delivery("lockstep", "job/run", 3))
    assert content_of(long, digest=DIGEST, has_payload=True) == b""
    assert content_of(lockstep, digest=DIGEST, has_payload=True) == b""
    assert content_of(task(), digest=b"", has_payload=True) == b""
    again = task()
    answers.make(asked := task(), Result(task=asked.id), Heard(b"", 1), leaves="model")
    assert answers.kept(again, Heard(b"", 2)) is None


def test_failure_is_no_answer_for_the_next_process(answers: Answers) -> None:
    asked, again = task("evaluate"), task("evaluate")
    make(answers, asked, 1, status=Status.FAILED, reason="no memory")
    assert answers.kept(again, heard(again, 2)) is None
    assert answers.kept(asked, heard(asked, 1)) is not None


def test_script_that_is_deployed_anew_leaves_the_answer_of_the_round(answers: Answers) -> None:
    asked, again = task(), task()
    make(answers, asked, 1)
    make(answers, task("deploy"), 2)
    assert answers.kept(again, heard(again, 2)) is not None
    # of answers with a model there is one
    later = task(number=4)
    make(answers, later, 2)
    assert answers.kept(again, heard(again, 3)) is None
    answers.forget("job")
    assert answers.kept(later, heard(later, 2)) is None
