from __future__ import annotations

import numpy as np
import pytest

from fedbio.errors import ProtocolError
from fedbio.federation import FLModel, ParamsType, Result, Status, Task
from fedbio.federation.model import decode, encode


def test_task_keeps_everything_over_the_wire() -> None:
    model = FLModel(
        params={"layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
        optimizer_params={"momentum": np.ones(2)},
        metrics={"loss": 0.5},
        meta={"seed": 3, "classes": ["a", "b"]},
        params_type=ParamsType.DIFF,
        current_round=2,
        total_rounds=5,
    )
    body, tensors = encode(Task(name="train", model=model, job="study", id="1"))
    assert set(tensors) == {"params/layers.0.weight", "optimizer/momentum"}
    back = decode(Task, body, tensors)
    assert (back.name, back.job, back.id) == ("train", "study", "1")
    assert (back.model.metrics, back.model.meta) == ({"loss": 0.5}, {"seed": 3, "classes": ["a", "b"]})
    assert (back.model.params_type, back.model.current_round, back.model.total_rounds) == (ParamsType.DIFF, 2, 5)
    # the same memory: nothing was copied
    assert back.model.params["layers.0.weight"] is model.params["layers.0.weight"]


def test_long_body_travels_in_the_payload() -> None:
    model = FLModel(meta={"rows": ["x" * 1000] * 1000})
    body, tensors = encode(Result(task="1", model=model))
    assert body == b""
    assert decode(Result, body, tensors).model.meta == model.meta


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xc1", b"\xff" * 40, b"\x81\xa4task\x01"])
def test_malformed_body_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a result"):
        decode(Result, body, {})


def test_tensor_of_no_part_is_a_protocol_error() -> None:
    body, _ = encode(Result(task="1", status=Status.DONE))
    with pytest.raises(ProtocolError, match="'secret/rows' belongs to no part"):
        decode(Result, body, {"secret/rows": np.ones(1)})


def test_weight_that_is_no_number_is_not_a_number() -> None:
    assert np.isnan(FLModel(meta={"weight": "many"}).weight)
    assert FLModel(meta={"weight": 7}).weight == 7
    assert FLModel().weight == 0
