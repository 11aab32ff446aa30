"""What task and result carry: named parameters, metrics, meta and round numbers, and their form on the wire.

On the wire a message is a body (MessagePack, written and checked by msgspec) and a payload of named tensors. Arrays
never enter the body. A body beyond `MAX_INLINE_BYTES` travels as one more tensor, so that a long table needs no
other way.
"""

from __future__ import annotations

__all__ = [
    "IN_MEMORY",
    "MAX_BODY_BYTES",
    "PARAMS",
    "WEIGHT",
    "Delivery",
    "FLModel",
    "Parameters",
    "ParamsType",
    "Result",
    "Status",
    "Task",
    "decode",
    "encode",
]

import enum
import uuid
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.errors import ProtocolError

Parameters = dict[str, NDArray[Any]]
"""Named tensors of a model."""

WEIGHT = "weight"
"""Key in `FLModel.meta`: the number of proteins behind a result, its weight in an average; 0 abstains."""

MAX_INLINE_BYTES = 512 * 1024
"""Longer bodies travel in the payload."""

MAX_BODY_BYTES = 64 << 20
"""The longest body that is read out of a payload."""

PARAMS = "params/"
"""Before the names of a model's parameters, among the tensors of a message."""

_OPTIMIZER, _BODY = "optimizer/", "body"


class ParamsType(enum.StrEnum):
    """Whether parameters are a whole model or what to add to the one that was received."""

    FULL = "FULL"
    DIFF = "DIFF"


class Status(enum.StrEnum):
    """How a task ended at a site."""

    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"


class Delivery(msgspec.Struct, frozen=True):
    """How the parameters of an answer come to the server.

    Parameters
    ----------
    kind : str
        ``"memory"``: with the answer, to be held in memory; ``"file"``: with the answer, into a file;
        ``"lockstep"``: not with the answer, the site keeps them as its part of an exchange.
    run, round : str, int
        Which exchange it is a part of: the run, and the round that begins with the mean.
    """

    kind: Literal["memory", "file", "lockstep"] = "memory"
    run: str = ""
    round: int = 0


IN_MEMORY = Delivery()


class FLModel(msgspec.Struct, kw_only=True):
    """The content of a task or a result.

    Parameters
    ----------
    params : dict of str to ndarray
        The model's parameters, or their differences; empty if only numbers travel.
    optimizer_params : dict of str to ndarray
        State of an optimizer; no workflow asks for it, and a result that has one is refused.
    metrics : dict of str to float
        Numbers that describe the model, such as ``"validation_accuracy"``.
    meta : dict
        JSON values that say what to do, or what was done.
    params_type : ParamsType
    start_round, current_round, total_rounds : int
        Rounds count from 0.
    held : str
        The run whose model of `current_round` the site holds, and adds to `params`.
    """

    params: Parameters = {}
    optimizer_params: Parameters = {}
    metrics: dict[str, float] = {}
    meta: dict[str, Any] = {}
    params_type: ParamsType = ParamsType.FULL
    start_round: int = 0
    current_round: int = 0
    total_rounds: int = 1
    held: str = ""

    @property
    def weight(self) -> float:
        """The number of proteins behind the model, as the site tells it."""
        value = self.meta.get(WEIGHT, 0)
        return float(value) if isinstance(value, (int, float)) else float("nan")


class Task(msgspec.Struct, kw_only=True):
    """One piece of work that a controller hands to a site."""

    name: str
    model: FLModel
    job: str = ""
    id: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    delivery: Delivery = IN_MEMORY
    """How the answer's parameters shall come."""
    answer_scheme: str | None = None
    """The quantization scheme in which the answer's parameters shall travel."""
    workflow: str = ""
    """The workflow of the job, and the rounds that it will have at most: what a site's policy may look at."""
    rounds: int = 0
    feedback: str = ""
    """The run in which the site adds to its next answer what quantization took from its last one."""


class Result(msgspec.Struct, kw_only=True):
    """A site's one answer to one task; `site` is put in by the receiver, from the sender's certificate."""

    task: str
    model: FLModel = msgspec.field(default_factory=FLModel)
    status: Status = Status.DONE
    reason: str = ""
    last_lines: tuple[str, ...] = ()
    """Of a script that has failed."""
    site: str = ""


M = TypeVar("M", Task, Result)


def encode(message: Task | Result) -> tuple[bytes, Parameters]:
    """Return the body of a message and the named tensors of its payload; no array is copied."""
    model = message.model
    # a model may be of a class that says where its parameters are; that stays here
    numbers = {name: getattr(model, name) for name in FLModel.__struct_fields__}
    bare = FLModel(**{**numbers, "params": {}, "optimizer_params": {}})
    body = msgspec.msgpack.encode(msgspec.structs.replace(message, model=bare))
    tensors = {PARAMS + name: value for name, value in model.params.items()}
    tensors |= {_OPTIMIZER + name: value for name, value in model.optimizer_params.items()}
    if len(body) > MAX_INLINE_BYTES:
        tensors[_BODY] = np.frombuffer(body, dtype=np.uint8)
        body = b""
    return body, tensors


def decode(kind: type[M], body: bytes, tensors: Mapping[str, NDArray[Any]]) -> M:
    """Rebuild a message from its body and the tensors of its payload; no array is copied.

    Raises
    ------
    ProtocolError
        If the body is not a message of this kind, or a tensor's name belongs to no part of it.
    """
    named = dict(tensors)
    try:
        if not body and _BODY in named:
            long = named.pop(_BODY)
            if long.nbytes > MAX_BODY_BYTES:
                raise ProtocolError(f"a body of {long.nbytes} bytes, at most {MAX_BODY_BYTES} are read")
            body = long.tobytes()
        message = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"a message is not a {kind.__name__.lower()}: {error}; do both ends run one release?"
        ) from error
    if message.model.params or message.model.optimizer_params:
        raise ProtocolError("a message carries arrays in its body; they belong into its payload")
    for name, value in named.items():
        prefix, slash, rest = name.partition("/")
        part = {PARAMS: message.model.params, _OPTIMIZER: message.model.optimizer_params}.get(prefix + slash)
        if part is None:
            raise ProtocolError(f"tensor {name!r} belongs to no part of a message; do both ends run one release?")
        part[rest] = value
    return message
