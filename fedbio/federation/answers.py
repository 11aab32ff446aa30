"""A site's results in the form in which they leave, kept for a server that asks for them again.

A server that was killed and started anew asks for its round once more, under a new id. A site that did the task again
would train twice in one round, and what its script keeps between rounds, such as an optimizer's moments or the state of
random numbers, would be one round ahead: the model would be another one. So the same answer goes out again.
"""

from __future__ import annotations

__all__ = ["Answer", "Answers", "Heard", "content_of", "failure"]

from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
from blake3 import blake3

from fedbio.errors import FormatError
from fedbio.federation import messages
from fedbio.federation.held import Held
from fedbio.federation.model import FLModel, Result, Status, Task, decode, encode
from fedbio.federation.quantization import Packer
from fedbio.transport import Payload

TENSOR_KINDS = ("model", "sealed", "sums")
"""Kinds in the ledger that are tensors; an answer without any is only the numbers beside them."""


@dataclass(slots=True)
class Answer:
    """A result in its wire form: the server may ask for it again after a break."""

    task: str
    body: bytes
    payload: Payload | None
    kind: str
    """What it is in the ledger."""
    topic: str = messages.RESULT


class Heard(NamedTuple):
    """How a task came.

    Parameters
    ----------
    content : bytes
        The same for tasks that are the same but for their id; empty if nobody can say.
    arrival : int
        Counts the arrivals of the server's processes: which of them has sent it.
    """

    content: bytes = b""
    arrival: int = 0


class _Kept(NamedTuple):
    answer: Answer
    heard: Heard


def content_of(task: Task, *, digest: bytes, has_payload: bool) -> bytes:
    """Return what `Heard.content` is of a task whose payload came with a digest."""
    body, _ = encode(msgspec.structs.replace(task, id=""))
    known = body and (digest or not has_payload) and task.delivery.kind != "lockstep"
    return blake3(body).digest() + digest if known else b""


class Answers:
    """Makes answers, and keeps the last one to each kind of task of a job; of those that hold a model, the last.

    Parameters
    ----------
    held : Held
        Takes the parameters of an answer that leave as a part of an exchange among the sites.
    """

    def __init__(self, held: Held) -> None:
        self._held = held
        self._packer = Packer()
        self._kept: dict[str, dict[str, _Kept]] = {}
        """By job and name of the task."""

    @property
    def keeps(self) -> bool:
        """Whether something that quantization took waits for the next model."""
        return self._packer.keeps

    def kept(self, task: Task, heard: Heard) -> Answer | None:
        """Return the answer to a task that was done before, for this process of the server or for one before it."""
        found = self._kept.get(task.job, {}).get(task.name)
        if found is None or found.answer.task == task.id:
            return found and found.answer
        if not heard.content or heard.content != found.heard.content or heard.arrival <= found.heard.arrival:
            # one process that asks for the same twice wants it done twice
            return None
        answer = _under(found.answer, task.id)
        if answer is not None:
            self._kept[task.job][task.name] = _Kept(answer, heard)
        return answer

    def make(self, task: Task, result: Result, heard: Heard, *, leaves: str) -> Answer:
        """Put a result into the form in which it leaves, and keep it; `leaves` is what its executor calls it."""
        answer = self._made(task, result, leaves)
        kept = self._kept.setdefault(task.job, {})
        if answer.payload is not None:
            # one model is enough to hold
            for name in [name for name, each in kept.items() if each.answer.payload is not None]:
                del kept[name]
        kept[task.name] = _Kept(answer, heard)
        return answer

    def forget(self, job: str) -> None:
        """A job is over."""
        self._kept.pop(job, None)

    def _made(self, task: Task, result: Result, leaves: str) -> Answer:
        try:
            if task.delivery.kind == "lockstep":
                result = self._keep_part(task, result)
            body, tensors = encode(result)
            payload = self._packer.pack(tensors, task.answer_scheme, feedback=task.feedback)
        except FormatError as error:
            return failure(task.id, f"its model cannot be sent: {error}")
        kind = leaves if result.status is Status.DONE else "control"
        if payload is None and kind in TENSOR_KINDS:
            kind = "metrics"
        in_file = payload is not None and task.delivery.kind == "file"
        return Answer(task.id, body, payload, kind, messages.UPDATE if in_file else messages.RESULT)

    def _keep_part(self, task: Task, result: Result) -> Result:
        """Keep the parameters of a result for the exchange that they are a part of; return what leaves at once."""
        # in an order that all sites have
        tensors = {name: result.model.params[name] for name in sorted(result.model.params)}
        payload = self._packer.pack(tensors, task.answer_scheme, feedback=task.feedback, prefix="")
        if payload is not None:
            self._held.keep_part(task.delivery, payload)
        return msgspec.structs.replace(result, model=msgspec.structs.replace(result.model, params={}))


def _under(answer: Answer, task: str) -> Answer | None:
    """Return an answer under another id; None if it says that the task was not done, or says it in its payload."""
    if not answer.body:
        return None
    result = decode(Result, answer.body, {})
    if result.status is not Status.DONE:
        return None
    body, _ = encode(msgspec.structs.replace(result, task=task))
    return replace(answer, task=task, body=body)


def failure(task: str, reason: str) -> Answer:
    """Return the answer of a site that has no result."""
    body, _ = encode(Result(task=task, model=FLModel(), status=Status.FAILED, reason=reason))
    return Answer(task, body, None, "control")
