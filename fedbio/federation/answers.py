"""A site's results in the form in which they leave, each kept until the job's next task."""

from __future__ import annotations

__all__ = ["Answer", "Answers", "failure"]

from dataclasses import dataclass

import msgspec

from fedbio.errors import FormatError
from fedbio.federation import messages
from fedbio.federation.held import Held
from fedbio.federation.model import FLModel, Result, Status, Task, encode
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


class Answers:
    """Makes answers, and keeps the last one of each job.

    Parameters
    ----------
    held : Held
        Takes the parameters of an answer that leave as a part of an exchange among the sites.
    """

    def __init__(self, held: Held) -> None:
        self._held = held
        self._packer = Packer()
        self._kept: dict[str, Answer] = {}

    @property
    def keeps(self) -> bool:
        """Whether something that quantization took waits for the next model."""
        return self._packer.keeps

    def kept(self, task: Task) -> Answer | None:
        """Return the answer to a task that was done before."""
        answer = self._kept.get(task.job)
        return answer if answer is not None and answer.task == task.id else None

    def make(self, task: Task, result: Result, *, leaves: str) -> Answer:
        """Put a result into the form in which it leaves, and keep it; `leaves` is what its executor calls it."""
        answer = self._kept[task.job] = self._made(task, result, leaves)
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


def failure(task: str, reason: str) -> Answer:
    """Return the answer of a site that has no result."""
    body, _ = encode(Result(task=task, model=FLModel(), status=Status.FAILED, reason=reason))
    return Answer(task, body, None, "control")
