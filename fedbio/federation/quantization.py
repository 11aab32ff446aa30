"""How models travel between server and sites: in which scheme, and what becomes of what a scheme loses.

Nothing here sees a whole quantized model. On the way out a payload is quantized chunk by chunk; on the way in the
transport undoes it chunk by chunk, if the scheme was agreed. Training and averaging never know of it.

**Error feedback.** A sender keeps what quantization took from its last model, and adds it to the next. That is right
for whole models too, not only for updates, because each end goes on from what it received: a site trains the model
that came, the server's next model is the mean of what came. What was lost of one round is thus not lost but late, and
the errors of all rounds never add up to more than the last one. It also saves what is smaller than a scheme's step: it
gathers until it is a step.
"""

from __future__ import annotations

__all__ = ["EXACT", "Packer", "Travel", "scheme_of"]

from collections.abc import Container
from dataclasses import dataclass

from fedbio.federation.model import PARAMS, Parameters
from fedbio.tensors import ErrorFeedback
from fedbio.transport import Payload, TensorPayload


@dataclass(frozen=True, slots=True)
class Travel:
    """How the models of a task and of its answers travel.

    Parameters
    ----------
    to_sites, to_server : str or None
        A scheme of `fedbio.tensors.SCHEMES`; None for exact.
    exact : container of str
        Parameters of the task that travel as they are.
    feedback : str
        The run in which what quantization takes from one model is added to the next one; empty if it is lost.
    """

    to_sites: str | None = None
    to_server: str | None = None
    exact: Container[str] = ()
    feedback: str = ""


EXACT = Travel()


class Packer:
    """Makes a sender's payloads, and keeps what quantization took from its last model. For one thread at a time."""

    def __init__(self) -> None:
        self._run: tuple[str, str] = ("", "")
        self._feedback = ErrorFeedback("")

    @property
    def keeps(self) -> bool:
        """Whether something that quantization took waits for the next model."""
        return bool(self._run[0])

    def pack(
        self,
        tensors: Parameters,
        scheme: str | None = None,
        *,
        exact: Container[str] = (),
        feedback: str = "",
        prefix: str = PARAMS,
    ) -> TensorPayload | None:
        """Return the payload for the tensors of a message, see `fedbio.federation.model.encode`; None without any.

        Only those whose name begins with `prefix` are quantized.

        Raises
        ------
        FormatError
            If the scheme cannot hold a value.
        """
        if not tensors:
            return None
        kept = {name for name in tensors if not name.startswith(prefix) or name.removeprefix(prefix) in exact}
        if scheme is None:
            return TensorPayload(tensors)
        if feedback:
            # of one run at a time: the residual is as large as the model
            if self._run != (feedback, scheme):
                self._feedback = ErrorFeedback(scheme)
            self._run = ("", "")  # a value that cannot be quantized leaves half of a residual behind
            compensated = self._feedback.compensate({name: tensors[name] for name in tensors if name not in kept})
            self._run = (feedback, scheme)
            tensors = {**tensors, **compensated}
        return TensorPayload(tensors, scheme, exact=kept)


def scheme_of(payload: Payload | None) -> str | None:
    """Return the scheme in which a payload travels."""
    return payload.quantization if isinstance(payload, TensorPayload) else None
